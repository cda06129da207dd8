"""Tied embeddings in a pipeline: the first and the last layer have a copy each, whose gradients are summed."""

import torch
import torch.distributed as dist
from torch import nn


class TiedWeight:
    """`original` is the embedding's weight, which is trained, saved and counted; `copy` is the head's.

    Each is None on a rank of the pipeline that does not hold it. Also a rank that holds both keeps their gradients
    apart, so that every layout adds the same numbers in the same order; on one device they share their memory.
    group: the ranks of the pipeline. first, last: those of them that hold the original and the copy.
    """

    def __init__(
        self, original: nn.Parameter | None, copy: nn.Parameter | None, group: dist.ProcessGroup, first: int, last: int
    ) -> None:
        self.original = original
        self.copy = copy
        self.group = group
        self.first, self.last = (dist.get_global_rank(group, rank) for rank in (first, last))

    def sum_gradients(self) -> None:
        """Add the copy's gradient to the original's, once all micro-batches went backwards. Both holders call it."""
        gradient = None if self.copy is None else self.copy.grad
        if self.original is None:
            if gradient is not None:
                dist.send(gradient, self.first, group=self.group)
        else:
            if gradient is None:
                gradient = torch.empty_like(self.original)
                dist.recv(gradient, self.last, group=self.group)
            assert self.original.grad is not None
            self.original.grad += gradient.to(self.original.device)
        if self.copy is not None:
            self.copy.grad = None

    @torch.no_grad()
    def share_value(self) -> None:
        """Bring the original's value to the copy. Both holders call it."""
        if self.original is not None and self.copy is not None:
            if self.original.data_ptr() != self.copy.data_ptr():
                self.copy.copy_(self.original)
        elif self.original is not None:
            dist.send(self.original.detach(), self.last, group=self.group)
        elif self.copy is not None:
            dist.recv(self.copy.detach(), self.first, group=self.group)
