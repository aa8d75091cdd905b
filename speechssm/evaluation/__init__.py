"""What each stage is worth on held-out recordings: one file per family of metrics."""
