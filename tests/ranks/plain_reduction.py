"""The sum of gradients without a fixed order and without overlap, with which `OverlappedReduction` is compared."""

from contextlib import AbstractContextManager, nullcontext

import torch.distributed as dist

from fira.parallel.gradients import gradient_of
from fira.parallel.overlapped_reduction import OverlappedReduction
from pipeline.schedule import Action


class PlainReduction(OverlappedReduction):
    """Sums gradients over micro-batches by autograd, and over replicas after the last backward, one after another."""

    def around_backward(self, action: Action, last: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def finish(self) -> None:
        if self._tied:
            self._tied.sum_gradients()
        for shard in self._shards_of_rank:
            dist.all_reduce(gradient_of(shard), group=self._groups[shard.expert])
