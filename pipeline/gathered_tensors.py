"""Tensors that each rank of a group has while they are used, and of which each is kept by one rank, its owner.

tensors     a b c d       owners 0 1 1 0
between     a . . d  ─┐
uses        . b c .  ─┴─ gather: broadcasts ─▶  a b c d on both  ── release ─▶  a . . d
                                                                                . b c .
All tensors of an owner are views of one buffer, so that a gather is one broadcast of each owner without copies. Where a
tensor is released, its storage has size zero; autograd may have saved it, and needs it gathered in the backward.
"""

from collections.abc import Sequence
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

ALIGNMENT = 64  # bytes, as of tensors that torch allocates: products may be rounded differently at other addresses


class GatheredTensors:
    """The tensors of one dtype and device in a group.

    tensors: each as a list of all tensors that share its memory; the first one is contiguous, and the others have its
    shape or are expansions of it. Every rank has the values; they are moved to the buffers, and released.
    """

    def __init__(self, tensors: Sequence[Sequence[Tensor]], owners: Sequence[int], group: dist.ProcessGroup) -> None:
        self._group, self._rank, self._uses = group, dist.get_rank(group), 0
        self._buffers: dict[int, Tensor] = {}  # by owner
        for owner in sorted(set(owners)):
            self._buffers[owner] = _move_to_buffer([t for t, o in zip(tensors, owners, strict=True) if o == owner])
        self._free()

    @torch.no_grad()
    def gather(self) -> None:
        """Begin a use of the tensors, and get those of other owners unless they are already in use (collective)."""
        self._uses += 1
        if self._uses > 1:
            return
        works = []
        for owner, buffer in self._buffers.items():
            if owner != self._rank:
                buffer.untyped_storage().resize_(buffer.nbytes)
            works.append(dist.broadcast(buffer, group=self._group, group_src=owner, async_op=True))
        for work in works:
            cast(dist.Work, work).wait()

    def release(self) -> None:
        """End a use of the tensors; at the end of the last one, free those of other owners."""
        self._uses -= 1
        if not self._uses:
            self._free()

    def _free(self) -> None:
        for owner, buffer in self._buffers.items():
            if owner != self._rank:
                buffer.untyped_storage().resize_(0)


def _move_to_buffer(tensors: Sequence[Sequence[Tensor]]) -> Tensor:
    """Make tensors views of one new buffer with their values, and return the buffer."""
    first = tensors[0][0]
    unit = ALIGNMENT // first.element_size()
    sizes = [-(-shared[0].numel() // unit) * unit for shared in tensors]
    buffer = first.new_zeros(sum(sizes), requires_grad=False)
    for (tensor, *others), part in zip(tensors, buffer.split(sizes), strict=True):
        view = part[: tensor.numel()].view(tensor.shape)
        view.copy_(tensor.detach())
        for shared in (tensor, *others):
            # A tensor that is set as data keeps its own version, which autograd compares, when the buffer is written.
            shared.data = view.expand(shared.shape)
    return buffer
