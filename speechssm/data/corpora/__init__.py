"""Corpora: one recipe each, behind the interface in `base`."""
