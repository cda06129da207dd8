"""Divide independent computations over the ranks of a group, and share the results."""

from collections.abc import Callable, Iterator, Sequence

import torch.distributed as dist
from torch import Tensor

from pipeline.owned_tensors import balanced_owners, share_owned


class DividedWork:
    """Computes tensors of the shapes and dtype of `like`, each on one rank of the group. None: all on this rank."""

    def __init__(self, like: Sequence[Tensor], costs: Sequence[float], group: dist.ProcessGroup | None) -> None:
        self._like, self._group = like, group
        self._owners = balanced_owners(costs, 1 if group is None else dist.get_world_size(group))

    def results(self, compute: Callable[[int], Tensor]) -> Iterator[tuple[int, Tensor]]:
        """Yield the index and the result of every computation (collective).

        compute: returns the result with a given index. A result may be on the device of the first one.
        """
        if self._group is None or dist.get_world_size(self._group) == 1:
            yield from ((i, compute(i)) for i in range(len(self._like)))
            return
        rank = dist.get_rank(self._group)
        results = [self._like[0].new_empty(like.shape) for like in self._like]
        for i, owner in enumerate(self._owners):
            if owner == rank:
                results[i].copy_(compute(i))
        share_owned(results, self._owners, self._group)
        yield from enumerate(results)
