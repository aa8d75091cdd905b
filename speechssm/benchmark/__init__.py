"""Speed and memory: one module per subject, each with one `run_*` function."""
