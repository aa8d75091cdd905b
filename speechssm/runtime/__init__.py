"""Where a run happens: training, resuming, sweeps, accelerators, callbacks, loggers."""
