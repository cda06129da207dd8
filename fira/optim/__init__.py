"""Optimizers AdamW and Muon, learning-rate schedules, and loss scale."""
