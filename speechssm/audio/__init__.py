"""Waveforms: reading and writing, resampling, log-mel features, fixed windows with overlap."""
