"""Shards on disk, and the endless, resumable streams of fixed-shape batches that they feed."""
