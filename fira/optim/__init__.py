"""Optimizer: AdamW, learning-rate schedule, and loss scale."""
