"""Tensors that all ranks of a group hold, each of which is computed by one of them, its owner.

tensors    a b c d       owners 0 1 1 0
rank 0     a . . d  ─┐
rank 1     . b c .  ─┴─ all-gather ─▶  a b c d on both
"""

import heapq
from collections.abc import Iterator, Sequence
from itertools import zip_longest

import torch.distributed as dist
from torch import Tensor

LIMIT = 2**22  # bytes of each rank that are gathered at a time, unless a single tensor is larger


def balanced_owners(costs: Sequence[float], ranks: int) -> list[int]:
    """The owner of each tensor, so that the sums of their costs are about equal. Every rank finds the same ones.

    Each cost in descending order is assigned to the rank with the smallest sum, and the largest sum is at most 4/3 of
    the optimum (Graham 1969).
    """
    owners = [0] * len(costs)
    sums = [(0.0, rank) for rank in range(min(ranks, len(costs)))]  # a heap
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        total, owners[i] = sums[0]
        heapq.heapreplace(sums, (total + costs[i], owners[i]))
    return owners


def share_owned(tensors: Sequence[Tensor], owners: Sequence[int], group: dist.ProcessGroup) -> None:
    """Copy each tensor from its owner to all ranks of a group (collective). All have the same dtype and device."""
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    if ranks == 1 or not tensors:
        return
    by_owner = [[tensor for tensor, owner in zip(tensors, owners, strict=True) if owner == r] for r in range(ranks)]
    for parts in zip_longest(*map(_chunks, by_owner), fillvalue=[]):
        length = max(sum(tensor.numel() for tensor in part) for part in parts)
        rows = list(tensors[0].new_empty(ranks, length).unbind())
        _copy(parts[rank], rows[rank], to_row=True)
        dist.all_gather(rows, rows[rank].clone(), group=group)
        for owner, part in enumerate(parts):
            if owner != rank:
                _copy(part, rows[owner], to_row=False)


def _chunks(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Consecutive tensors of about LIMIT bytes together."""
    chunk: list[Tensor] = []
    for tensor in tensors:
        if chunk and sum(other.nbytes for other in chunk) + tensor.nbytes > LIMIT:
            yield chunk
            chunk = []
        chunk.append(tensor)
    if chunk:
        yield chunk


def _copy(tensors: Sequence[Tensor], row: Tensor, to_row: bool) -> None:
    sizes = [tensor.numel() for tensor in tensors]
    for tensor, part in zip(tensors, row[: sum(sizes)].split(sizes), strict=True):
        (part if to_row else tensor).copy_(tensor.view(-1) if to_row else part.view_as(tensor))
