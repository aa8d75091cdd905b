"""Spoken language models that speak without end in constant memory."""

__version__ = "0.1.0"
