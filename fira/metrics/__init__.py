"""Metrics of a run: CSV log, console output, and plots."""
