"""Split the sequences of a global batch into the micro-batches of one replica.

sequences   0 1 | 2 3 | 4 5 | 6 7 | 8 – | – –    microbatch 2, dp 2, "–": padding, a sequence of length zero
micro-batch   0     1     2     3     4     –
replica       0     0     0     1     1     1
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from fira.nn.context import Context, TrainingContext, pinned_for
from fira.nn.cross_entropy import IGNORE_INDEX
from pipeline.engine import MicroBatch
from pipeline.tree_sum import leaves_of

Read = Callable[[int, int], tuple[np.ndarray, np.ndarray]]  # (first, count) → tokens, targets [count, T]


@dataclass(frozen=True)
class BatchSplit:
    """Each replica gets consecutive micro-batches of `microbatch` sequences, as `tree_sum.leaves_of` defines them.

    Every replica runs the same number of micro-batches of the same size, so that all ranks call the same collectives.
    They are padded with sequences of length zero, whose targets are ignored and whose weight is zero.
    """

    microbatch: int
    dp: int
    dp_rank: int
    width: int  # of the hidden tensor
    device: torch.device | None = None  # of the contexts; None: the CPU
    dtype: torch.dtype = torch.float32  # of the weights of auxiliary losses, as of the parameters

    def total(self, sequences: int) -> int:
        """The number of micro-batches of a global batch of this many sequences, without those that only pad it."""
        return -(-sequences // self.microbatch)

    def numbers(self, sequences: int) -> range:
        """The numbers of this replica's micro-batches of the global batch; padding follows them."""
        return leaves_of(self.dp_rank, self.dp, self.total(sequences))

    def count(self, sequences: int) -> int:
        """The number of micro-batches that each replica runs for a global batch of this many sequences."""
        return -(-self.total(sequences) // self.dp)

    def microbatches(
        self, read: Read, first: int, sequences: int, dropout_seed: int | None, loss_scale: float = 1.0
    ) -> list[MicroBatch]:
        """This replica's micro-batches of the global batch of sequences first, …, first + sequences − 1.

        read: returns tokens and targets by sequence number. The objective is the mean over all targets that are not
        ignored. dropout_seed: None in evaluation, which has no dropout, noise or auxiliary loss.
        loss_scale: factor of the objective, for fp16.
        """
        tokens, targets = read(first, sequences)
        lengths = (targets != IGNORE_INDEX).sum(1)
        weight = loss_scale / max(1, lengths.sum())
        result = []
        numbers = self.numbers(sequences)
        for i in range(self.count(sequences)):
            j = numbers.start + i if i < len(numbers) else self.total(sequences)
            rows = slice(j * self.microbatch, (j + 1) * self.microbatch)
            missing = self.microbatch - len(tokens[rows])
            following = torch.from_numpy(_pad(targets[rows], missing, IGNORE_INDEX))
            valid = torch.from_numpy(_pad(lengths[rows], missing, 0))
            context = Context(lengths=valid, training=TrainingContext(following, loss_weight=weight))
            if dropout_seed is not None:
                keys = [_key(dropout_seed, number) for number in range(first + rows.start, first + rows.stop)]
                context.keys = torch.tensor(keys)
                context.training.aux_weights = valid * torch.tensor(weight, dtype=self.dtype)
            inputs = torch.from_numpy(_pad(tokens[rows], missing, 0))
            if self.device:
                inputs = pinned_for(self.device, inputs)
            result.append(
                MicroBatch(
                    inputs=inputs,
                    boundary=torch.Size((*inputs.shape, self.width)),
                    context=context.to(self.device) if self.device else context,
                )
            )
        return result


def _pad(rows: np.ndarray, missing: int, value: int) -> np.ndarray:
    """Append `missing` rows that are filled with a value."""
    return np.concatenate([rows, np.full((missing, *rows.shape[1:]), value, rows.dtype)])


def _key(seed: int, sequence: int) -> int:
    """A hash of 62 bits, which determines the dropout and noise of one sequence of one run."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{sequence}".encode()).digest()[:8], "little") >> 2
