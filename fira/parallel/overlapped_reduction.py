"""Sum gradients over replicas during the backward, where collectives run on a stream of their own, as with NCCL.

The last backward of a stage with three layers, on one rank:

    compute stream       │ layer 2 │ layer 1 │ layer 0 │ … │ [3] wait
    stream of the group            │ reduce 2 │ reduce 1 │ reduce 0 │
                                  [1]        [1]       [2]

[1] When the first gradient of a layer arrives, the backward of all layers above it is done: their reductions start.
[2] After the last backward of a stage, the reductions of its other layers start.
[3] At the end of the step, the gradient of a tied embedding is reduced, and the compute stream waits.

All ranks of a group must start their reductions in the same order. They do, because the ranks of a stage run the same
list of actions, and the layers of a stage always start in descending order. The host waits for nothing.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch.distributed as dist
from torch import Tensor

from fira.parallel.gradients import gradient_of
from fira.parallel.parallelize import DistributedModel
from fira.parallel.param_shard import ParamShard
from pipeline.mesh import Mesh
from pipeline.schedule import Action


class OverlappedReduction:
    """Has the methods of `GradientSum`. Autograd sums over micro-batches, NCCL over replicas: the order is not fixed.

    torchgpipe runs the layers of a stage in several threads and chunks, so a stage that is split over several devices
    is reduced after its last backward.
    """

    def __init__(self, model: DistributedModel, mesh: Mesh) -> None:
        self._stages = model.stages
        self._groups = {False: mesh.groups["dp"], True: mesh.groups["edp"]}
        self._per_layer = len(mesh.ep_groups) == 1  # one local device
        self._shards_of_rank = model.shards
        self._tied = model.tied
        self._shards: dict[int, list[ParamShard]] = defaultdict(list)  # by layer
        for shard in model.shards:
            self._shards[shard.layer].append(shard)
        self._works: list[dist.Work] = []

    def begin(self, microbatches: int) -> None:
        """Start a step."""
        for shard in self._shards_of_rank:
            shard.parameter.grad = None

    def around_backward(self, action: Action, last: bool) -> AbstractContextManager[None]:
        """Context manager for one action of a backward. The last one of a stage starts the reductions."""
        return self._last_backward(action.stage) if last else nullcontext()

    @contextmanager
    def _last_backward(self, stage: int) -> Iterator[None]:
        waiting = list(self._stages[stage])

        def arrived(layer: int) -> None:
            if layer not in waiting:
                raise RuntimeError(f"a gradient of layer {layer} arrived after the reduction of the layer had started")
            while waiting[-1] > layer:
                self._start_layer(waiting.pop())  # [1]

        hooks = [
            shard.parameter.register_post_accumulate_grad_hook(lambda _, layer=layer: arrived(layer))
            for layer in waiting
            for shard in self._shards[layer]
            if self._per_layer
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        while waiting:
            self._start_layer(waiting.pop())  # [2]

    def finish(self) -> None:
        """Let the device wait until all gradients are reduced (collective)."""
        if self._tied:
            self._tied.sum_gradients()
            self._start([shard for shard in self._shards[0] if shard.parameter is self._tied.original])  # [3]
        for work in self._works:
            work.wait()
        self._works = []

    def _start_layer(self, layer: int) -> None:
        tied = self._tied.original if self._tied else None
        self._start([shard for shard in self._shards[layer] if shard.parameter is not tied])

    def _start(self, shards: Sequence[ParamShard]) -> None:
        """Start one reduction of the gradients of each group and device, in place."""
        for expert, group in self._groups.items():
            by_device: dict[str, list[Tensor]] = defaultdict(list)
            for shard in shards:
                if shard.expert == expert and dist.get_world_size(group) > 1:
                    by_device[str(shard.parameter.device)].append(gradient_of(shard))
            for gradients in by_device.values():
                self._works.append(group.allreduce_coalesced(gradients))
