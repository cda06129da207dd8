"""Documents that are packed into sequences. Each is processed as if it were a sequence of its own.

Shapes: B sequences of T tokens; a sequence contains some documents, one after another, and then padding.

    tokens      a a a a b b c c c – –      T = 11, "–": padding
    numbers     0 0 0 0 1 1 2 2 2 -1 -1
    positions   0 1 2 3 0 1 0 1 2 0 1
    lengths     4 4 4 4 2 2 3 3 3 2 2
"""

from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor


class Documents(NamedTuple):
    """The document of each token; all tensors are int64 [B, T]."""

    numbers: Tensor  # of the document in the sequence, ascending from 0; −1 in padding
    positions: Tensor  # of the token in the document
    lengths: Tensor  # of the document

    @classmethod
    def of(cls, numbers: Tensor) -> Self:
        """Documents with these numbers [B, T]. Padding counts as one more document."""
        length = numbers.shape[1]
        at = torch.arange(length, device=numbers.device).expand_as(numbers)
        differs = numbers.diff(dim=1) != 0
        starts = at.where(F.pad(differs, (1, 0), value=True), 0).cummax(1).values
        ends = (at + 1).where(F.pad(differs, (0, 1), value=True), length).flip(1).cummin(1).values.flip(1)
        return cls(numbers, at - starts, ends - starts)

    @property
    def indices(self) -> Tensor:
        """`numbers` with 0 instead of −1, to index a dimension of documents. The caller masks the padding."""
        return self.numbers.clamp(min=0)

    def sums(self, x: Tensor, count: int) -> Tensor:
        """x [B, T, …], zero in padding → [B, count, …], the sum over each document. count: at least their number."""
        index = self.indices.view(*x.shape[:2], *[1] * (x.dim() - 2)).expand_as(x)
        return x.new_zeros(len(x), count, *x.shape[2:]).scatter_add(1, index, x)
