"""A complete checkpoint by one call, for tests that read checkpoints."""

from pathlib import Path
from typing import Any

from fira.checkpoint.shard_index import TensorShard
from fira.checkpoint.step_folders import step_name
from fira.checkpoint.writer import CheckpointWriter


def save_checkpoint(
    root: Path,
    step: int,
    weights: list[TensorShard],
    optimizer: list[TensorShard],
    documents: dict[str, dict[str, Any]],
    files: dict[str, bytes],
    layout: dict[str, Any],
    keep: int,
) -> Path:
    """Write a checkpoint as `CheckpointWriter.start`, wait until it is complete, and return its folder (collective)."""
    writer = CheckpointWriter(root, keep)
    writer.start(step, weights, optimizer, documents, files, layout)
    writer.finish()
    return root / step_name(step)
