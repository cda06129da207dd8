"""Split the sequences of a global batch into the micro-batches of one replica.

sequences   0 1 | 2 3 | 4 5 | 6 7 | 8 – | – –    microbatch 2, dp 2, "–": padding, a sequence of length zero
micro-batch   0     1     2     3     4     –
replica       0     0     0     1     1     1    consecutive
replica       0     1     0     1     0     1    alternating
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fira.data.rows import Rows
from fira.nn.context import Context, TrainingContext, pinned_for
from fira.nn.cross_entropy import IGNORE_INDEX
from fira.nn.documents import Documents
from fira.nn.objective import CrossEntropy, Objective
from pipeline.engine import MicroBatch
from pipeline.tree_sum import leaves_of

Read = Callable[[int, int], Rows]  # (number of the first sequence, count) → these sequences


class Batch(NamedTuple):
    """The part of one replica of a global batch.

    terms: the number of terms of the objective in the global batch. tokens: that of its tokens without padding.
    """

    microbatches: list[MicroBatch]
    terms: int
    tokens: int


@dataclass(frozen=True)
class BatchSplit:
    """Each replica gets consecutive micro-batches of `microbatch` sequences, as `tree_sum.leaves_of` defines them.

    alternating: replica r gets the micro-batches r, r + dp, … instead. The gradients of the replicas can then be summed
    after each micro-batch, see `ShardedGradientSum`.

    Every replica runs the same number of micro-batches of the same size, so that all ranks call the same collectives.
    They are padded with sequences of length zero, whose targets are ignored and whose weight is zero.
    """

    microbatch: int
    dp: int
    dp_rank: int
    width: int  # of the hidden tensor
    device: torch.device | None = None  # of the contexts; None: the CPU
    dtype: torch.dtype = torch.float32  # of the weights of auxiliary losses, as of the parameters
    objective: Objective = field(default_factory=CrossEntropy)
    alternating: bool = False

    def total(self, sequences: int) -> int:
        """The number of micro-batches of a global batch of this many sequences, without those that only pad it."""
        return -(-sequences // self.microbatch)

    def numbers(self, sequences: int) -> range:
        """The numbers of this replica's micro-batches of the global batch; padding follows them."""
        total = self.total(sequences)
        return range(self.dp_rank, total, self.dp) if self.alternating else leaves_of(self.dp_rank, self.dp, total)

    def count(self, sequences: int) -> int:
        """The number of micro-batches that each replica runs for a global batch of this many sequences."""
        return -(-self.total(sequences) // self.dp)

    def batch(self, read: Read, first: int, sequences: int, dropout_seed: int | None, loss_scale: float = 1.0) -> Batch:
        """This replica's micro-batches of the global batch of sequences first, …, first + sequences − 1.

        read: returns sequences by number. dropout_seed: None in evaluation, which has no dropout, noise
        or auxiliary loss. loss_scale: factor of the objective, for fp16.
        """
        rows = read(first, sequences)
        lengths, documents = rows.lengths(), rows.documents
        if documents is not None and not documents.any():  # each sequence is one document without padding
            documents = None
        terms, tokens = self.objective.count(rows.targets, rows.stored), int(lengths.sum())
        result = []
        numbers = self.numbers(sequences)
        for i in range(self.count(sequences)):
            j = numbers[i] if i < len(numbers) else self.total(sequences)
            span = slice(j * self.microbatch, (j + 1) * self.microbatch)
            missing = self.microbatch - len(rows.tokens[span])
            following = _padded(rows.targets[span], missing, IGNORE_INDEX)
            inputs = _padded(rows.tokens[span], missing, 0)
            if self.device:
                inputs = pinned_for(self.device, inputs)
            context = Context(
                tokens=inputs,
                lengths=_padded(lengths[span], missing, 0),
                documents=None if documents is None else Documents.of(_padded(documents[span], missing, -1)),
                training=TrainingContext(
                    following,
                    loss_weight=loss_scale / max(1, terms),
                    objective=self.objective,
                    stored={name: _padded(array[span], missing, 0) for name, array in rows.stored.items()},
                ),
            )
            if dropout_seed is not None:
                token_weight = torch.tensor(loss_scale / max(1, tokens), dtype=self.dtype)
                sequence_numbers = range(first + span.start, first + span.stop)
                _add_keys_and_aux_weights(context, dropout_seed, sequence_numbers, token_weight)
            result.append(
                MicroBatch(
                    inputs=inputs,
                    boundary=torch.Size((*inputs.shape, self.width)),
                    context=context.to(self.device) if self.device else context,
                )
            )
        return Batch(result, terms, tokens)


def _padded(rows: np.ndarray, missing: int, value: int) -> Tensor:
    """The rows, and `missing` more that are filled with a value."""
    return torch.from_numpy(np.concatenate([rows, np.full((missing, *rows.shape[1:]), value, rows.dtype)]))


def _add_keys_and_aux_weights(context: Context, seed: int, numbers: range, token_weight: Tensor) -> None:
    """Add keys and weights of the auxiliary losses for the sequences with these numbers, or for their documents."""
    documents, tokens = context.documents, context.lengths
    if documents is None:
        context.keys = torch.tensor([_key(seed, number) for number in numbers])
    else:
        count = max(1, int(documents.numbers.max()) + 1)
        context.keys = torch.tensor([[_key(seed, number, d) for d in range(count)] for number in numbers])
        tokens = documents.sums((documents.numbers >= 0).long(), count)
    assert tokens is not None
    context.training.aux_weights = tokens * token_weight


def _key(seed: int, sequence: int, document: int = 0) -> int:
    """A hash of 62 bits, which determines the dropout and noise of one document of one sequence of one run."""
    text = f"{seed}/{sequence}/{document}" if document else f"{seed}/{sequence}"
    return hashed(text)


def hashed(text: str) -> int:
    """A hash of a text, of 62 bits."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 2
