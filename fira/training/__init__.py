"""Training: configuration, set-up, loop, step, and run folder."""
