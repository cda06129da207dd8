"""From a global batch to one rank's micro-batches, split by sequences."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from fira.data.loader import IGNORE_INDEX
from fira.nn.context import Context
from pipeline.engine import MicroBatch

Read = Callable[[int, int], tuple[np.ndarray, np.ndarray]]  # (first, count) → tokens, targets [count, T]


@dataclass(frozen=True)
class BatchSplit:
    """How a global batch is cut: micro-batch j of `microbatch` sequences goes to replica j mod dp.

    Every replica runs the same number of micro-batches of the same size. What is missing at the end is filled with
    sequences of length zero, whose targets are ignored: they weigh nothing, and no collective waits for them.
    """

    microbatch: int
    dp: int
    dp_rank: int
    width: int  # of the hidden tensor
    device: torch.device | None = None  # where layers find what they know of a micro-batch; None: the CPU

    def count(self, sequences: int) -> int:
        """Micro-batches that each replica runs for a global batch of this many sequences."""
        return -(-sequences // (self.microbatch * self.dp))

    def microbatches(
        self, read: Read, first: int, sequences: int, dropout_seed: int | None, loss_scale: float = 1.0
    ) -> list[MicroBatch]:
        """This replica's part of the global batch of sequences first, …, first + sequences − 1.

        read: gives tokens and targets by sequence number; every target that is not ignored counts the same. Training
        passes a dropout_seed; without one (evaluation) there is neither dropout nor auxiliary loss.
        loss_scale: multiplies the objective, for fp16.
        """
        tokens, targets = read(first, sequences)
        lengths = (targets != IGNORE_INDEX).sum(1)
        weight = loss_scale / max(1, lengths.sum())
        made = []
        for j in range(self.dp_rank, self.count(sequences) * self.dp, self.dp):
            rows = slice(j * self.microbatch, (j + 1) * self.microbatch)
            missing = self.microbatch - len(tokens[rows])
            following = torch.from_numpy(_fill(targets[rows], missing, IGNORE_INDEX))
            valid = torch.from_numpy(_fill(lengths[rows], missing, 0))
            context = Context(lengths=valid, targets=following, loss_weight=weight)
            if dropout_seed is not None:
                numbers = range(first + rows.start, first + rows.stop)
                context.keys = torch.tensor([_key(dropout_seed, number) for number in numbers])
                context.aux_weights = context.lengths * weight
            inputs = torch.from_numpy(_fill(tokens[rows], missing, 0))
            made.append(
                MicroBatch(
                    inputs=inputs,
                    boundary=torch.Size((*inputs.shape, self.width)),
                    context=context.to(self.device) if self.device else context,
                )
            )
        return made


def _fill(rows: np.ndarray, missing: int, value: int) -> np.ndarray:
    return np.concatenate([rows, np.full((missing, *rows.shape[1:]), value, rows.dtype)])


def _key(seed: int, sequence: int) -> int:
    """A number of 62 random bits for one sequence of one run, from which its dropout follows."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{sequence}".encode()).digest()[:8], "little") >> 2
