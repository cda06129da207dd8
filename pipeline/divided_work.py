"""Divide independent computations over the ranks of a group, and share the results.

costs    [5, 3, 3, 1]                  the same on all ranks, so that all of them choose the same division
division rank 0: 0, 3   rank 1: 1, 2   the largest first, each to the rank with the smallest sum
results  each rank computes its own; an all-gather gives all of them to all ranks
"""

from collections.abc import Callable, Iterator, Sequence

import torch.distributed as dist
from torch import Tensor


def divide(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """The indices of each rank in ascending order, so that the sums of their costs are about equal.

    Each cost in descending order is assigned to the rank with the smallest sum, and the largest sum is at most 4/3 of
    the optimum (Graham 1969).
    """
    division: list[list[int]] = [[] for _ in range(ranks)]
    sums = [0.0] * ranks
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = sums.index(min(sums))
        division[rank].append(i)
        sums[rank] += costs[i]
    return [sorted(indices) for indices in division]


class DividedWork:
    """Computes tensors of the shapes and dtype of `like`, each on one rank of the group. None: all on this rank."""

    def __init__(self, like: Sequence[Tensor], costs: Sequence[float], group: dist.ProcessGroup | None) -> None:
        self._like, self._group = like, group
        self._division = divide(costs, 1 if group is None else dist.get_world_size(group))

    def results(self, compute: Callable[[int], Tensor]) -> Iterator[tuple[int, Tensor]]:
        """Yield the index and the result of every computation, in any order (collective).

        compute: returns the result with a given index. A result may be on the device of the first one.
        """
        if len(self._division) == 1 or not self._like:
            for i in range(len(self._like)):
                yield i, compute(i)
            return
        sizes = [[self._like[i].numel() for i in indices] for indices in self._division]
        length, rank = max(map(sum, sizes)), dist.get_rank(self._group)
        parts = [[*own, length - sum(own)] for own in sizes]  # of a row; the last one is not used
        row = self._like[0].new_empty(length)
        for i, part in zip(self._division[rank], row.split(parts[rank]), strict=False):
            part.view(self._like[i].shape).copy_(compute(i))
        rows = list(row.new_empty(len(sizes), length).unbind())
        dist.all_gather(rows, row, group=self._group)
        for indices, own, gathered in zip(self._division, parts, rows, strict=True):
            for i, part in zip(indices, gathered.split(own), strict=False):
                yield i, part.view(self._like[i].shape)
