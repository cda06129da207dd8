"""Tied embeddings in a pipeline.

    first rank   embedding  original ──value──▶ copy  head   last rank
                            original ◀──grad─── copy

The two gradients are summed after the last backward of a step; the value is sent after each update.
"""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import nn


class TiedWeight:
    """The weight of the embedding, `original`, and the copy of it in the head, `copy`.

    Only the original is updated, saved and counted. Each is None on a pipeline rank that does not hold it. A rank that
    holds both also keeps two gradients, so that every layout adds the same numbers in the same order; on one device
    the two share their memory.
    group: the ranks of the pipeline. first, last: the ranks within it that hold the original and the copy.
    kept: whether this rank has the values between uses, see `fira/parallel/layer_weights.py`.
    """

    def __init__(
        self, original: nn.Parameter | None, copy: nn.Parameter | None, group: dist.ProcessGroup, first: int, last: int
    ) -> None:
        self.original = original
        self.copy = copy
        self.group = group
        self.kept = True
        self.first, self.last = (dist.get_global_rank(group, rank) for rank in (first, last))

    def sum_gradients(self) -> None:
        """Add the copy's gradient to the original's, after the last backward of a step (collective over both ranks)."""
        grad = None if self.copy is None else self.copy.grad
        if self.original is not None:
            if grad is None:
                grad = torch.empty_like(self.original)
                dist.recv(grad, self.last, group=self.group)
            assert self.original.grad is not None
            self.original.grad += grad.to(self.original.device)
        elif grad is not None:
            dist.send(grad, self.first, group=self.group)
        if self.copy is not None:
            self.copy.grad = None

    @torch.no_grad()
    def share_value(self) -> None:
        """Copy the original's value to the copy (collective over both ranks), where this rank keeps them."""
        if not self.kept:
            return
        if self.original is not None and self.copy is not None:
            if self.original.data_ptr() != self.copy.data_ptr():
                self.copy.copy_(self.original)
        elif self.original is not None:
            dist.send(self.original.detach(), self.last, group=self.group)
        elif self.copy is not None:
            dist.recv(self.copy.detach(), self.first, group=self.group)


def tie(
    layers: Mapping[int, nn.Module], count: int, group: dist.ProcessGroup, placement: tuple[int, ...]
) -> TiedWeight:
    """Tie the head, the last of `count` layers, to the embedding (collective over the pipeline)."""
    original = layers[0].get_submodule("token").get_parameter("weight") if 0 in layers else None
    head_weight = None
    if count - 1 in layers:
        head = layers[count - 1].get_submodule("project")
        head_weight = head.get_parameter("weight")
        if original is not None and original.device == head_weight.device:
            # shares memory, but has a gradient of its own
            head_weight = nn.Parameter(original.detach(), original.requires_grad)
            head.register_parameter("weight", head_weight)
    tied = TiedWeight(original, head_weight, group, placement[0], placement[-1])
    tied.share_value()
    return tied
