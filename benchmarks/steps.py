"""A trainer on random tokens, for benchmarks of training steps."""

from typing import Any

import numpy as np
import torch

from fira.models.registry import build
from fira.parallel.batch_split import BatchSplit
from fira.parallel.parallelize import parallelize
from fira.planner.candidates import Candidate
from fira.training.trainer import Trainer
from pipeline.mesh import make_mesh
from pipeline.schedule import SCHEDULES

CPU = torch.device("cpu")


class RandomTokens:
    """A loader of random sequences."""

    def __init__(self, vocab_size: int, seq_len: int) -> None:
        self.consumed = 0
        self.shape = vocab_size, seq_len

    def batch(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens and targets of the sequences first, …, first + count − 1, each [count, seq_len]."""
        tokens = np.random.default_rng(first).integers(self.shape[0], size=(2, count, self.shape[1]))
        return tokens[0], tokens[1]


def trainer_of(
    config: Any, candidate: Candidate, device: torch.device = CPU, autocast: torch.dtype | None = None
) -> Trainer:
    """Return this rank's trainer of a model in one candidate layout (collective)."""
    mesh = make_mesh(candidate.layout, SCHEDULES[candidate.schedule].placement(candidate.layout.pp), [device])
    with torch.device("meta"):
        meta_model = build(config)
    model = parallelize(meta_model, mesh, 0, [device], candidate.schedule, autocast=autocast)
    split = BatchSplit(candidate.microbatch, candidate.layout.dp, mesh.dp_rank, config.d_model, device)
    return Trainer(model, mesh, split, candidate.schedule, 0.1, 1.0, False)
