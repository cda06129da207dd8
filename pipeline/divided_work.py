"""Divide independent computations over the ranks of a group, and share the results."""

from collections.abc import Callable, Iterator, Sequence

import torch.distributed as dist
from torch import Tensor

from pipeline.one_thread_each import OneThreadEach
from pipeline.owned_tensors import balanced_owners, share_owned


class DividedWork:
    """Computes tensors of the shapes and dtype of `like`, each on one rank of the group. None: all on this rank.

    A rank computes several of them at a time on a CPU, each on one thread.
    """

    def __init__(self, like: Sequence[Tensor], costs: Sequence[float], group: dist.ProcessGroup | None) -> None:
        self._like, self._group = like, group
        self._owners = balanced_owners(costs, 1 if group is None else dist.get_world_size(group))
        self._map = OneThreadEach().map if all(tensor.device.type == "cpu" for tensor in like) else map

    def results(self, compute: Callable[[int], Tensor]) -> Iterator[tuple[int, Tensor]]:
        """Yield the index and the result of every computation (collective).

        compute: returns the result with a given index, on any thread. A result may be on the device of the first one.
        """
        if self._group is None or dist.get_world_size(self._group) == 1:
            yield from enumerate(self._map(compute, range(len(self._like))))
            return
        rank = dist.get_rank(self._group)
        results = [self._like[0].new_empty(like.shape) for like in self._like]
        owned = [i for i, owner in enumerate(self._owners) if owner == rank]
        for i, result in zip(owned, self._map(compute, owned), strict=True):
            results[i].copy_(result)
        share_owned(results, self._owners, self._group)
        yield from enumerate(results)
