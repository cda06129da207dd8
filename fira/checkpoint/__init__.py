"""Checkpoints: files and manifest, step folders, pretrained weights, and names of transformers."""
