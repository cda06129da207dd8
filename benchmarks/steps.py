"""A trainer on made-up tokens, for benchmarks of whole steps."""

from typing import Any

import numpy as np
import torch

from fira.parallelize import parallelize
from fira.planning.ways import Way
from fira.training.batch import Split
from fira.training.trainer import Trainer
from pipeline.mesh import make_mesh

CPU = torch.device("cpu")


class RandomTokens:
    """Stands for a loader: its sequences are random."""

    def __init__(self, vocab_size: int, seq_len: int) -> None:
        self.consumed = 0
        self.shape = vocab_size, seq_len

    def batch(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Sequences first, …, first + count − 1: tokens and targets, [count, seq_len]."""
        tokens = np.random.default_rng(first).integers(self.shape[0], size=(2, count, self.shape[1]))
        return tokens[0], tokens[1]


def trainer_of(config: Any, way: Way, device: torch.device = CPU, autocast: torch.dtype | None = None) -> Trainer:
    """This rank's part of a model that is trained in a way (collective over all ranks)."""
    mesh = make_mesh(way.layout, [device])
    model = parallelize(config, mesh, config.seq_len, 0, [device], way.schedule, autocast=autocast)
    split = Split(way.microbatch, way.layout.dp, mesh.dp_rank, config.d_model, device)
    return Trainer(model, mesh, split, way.schedule, 0.1, 1.0, False)
