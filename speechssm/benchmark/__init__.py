"""Speed and memory: one module per subject, each with one function `run_SUBJECT(out, ...)`."""
