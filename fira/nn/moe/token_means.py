"""Means over the valid tokens of each sequence, or of each document that is packed into a sequence.

Shapes: B sequences of T tokens, k of E experts per token. A mean has the shape [S, …], where [S] is [B], or [B, D] with
at most D documents per sequence.
"""

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from fira.nn.documents import Documents
from fira.nn.moe.router import Routed


@dataclass(frozen=True)
class TokenMeans:
    """Computes means. valid: [B, T] bool. count: D, if there are documents."""

    valid: Tensor
    documents: Documents | None = None
    count: int = 1

    @cached_property
    def tokens(self) -> Tensor:
        """[S] int64, the number of valid tokens, at least one."""
        if self.documents is None:
            return self.valid.sum(1).clamp(min=1)
        return self.documents.sums(self.valid.long(), self.count).clamp(min=1)

    def __call__(self, x: Tensor) -> Tensor:
        """x [B, T, C] → [S, C]."""
        return self._sums(x * self.valid[..., None]) / self.tokens[..., None]

    def by_expert(self, routed: Routed, values: Tensor) -> Tensor:
        """Values [B, T, k, …] of the chosen experts → [S, E, …], where other experts have the value zero.

        Sums are in the precision of the logits, which is full precision also under autocast.
        """
        inner = [1] * (values.dim() - 2)
        rows = (values * self.valid.unflatten(1, (-1, *inner))).flatten(1, 2).to(routed.logits.dtype)
        index, buckets = routed.experts, routed.logits.shape[-1]
        if self.documents is not None:
            index, buckets = index + self.documents.indices[..., None] * buckets, self.count * buckets
        index = index.flatten(1).unflatten(1, (-1, *inner[1:])).expand_as(rows)
        sums = rows.new_zeros(len(rows), buckets, *rows.shape[2:]).scatter_add(1, index, rows)
        if self.documents is not None:
            sums = sums.unflatten(1, (self.count, -1))
        return sums / self.tokens.view(*self.tokens.shape, *inner)

    def _sums(self, x: Tensor) -> Tensor:
        """x [B, T, …], zero in padding → [S, …]."""
        return x.sum(1) if self.documents is None else self.documents.sums(x, self.count)
