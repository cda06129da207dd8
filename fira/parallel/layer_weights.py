"""The weights of a layer that its replicas divide (--shard parameters): a rank has them while it uses the layer.

    forward of the layer      gather ── compute ── release
    backward of the layer     gather ── compute ── release ── [1] gradients to their owners

Each use of a layer gathers its weights, for every micro-batch and also in a pipeline: weights that were kept from the
forward to the backward would be those of the whole stage. [1] is done by `ShardedGradientSum`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch.distributed as dist
from torch import nn

from fira.parallel.cast_weights import CastCopy
from fira.parallel.param_shard import AXES, ParamShard
from fira.parallel.tied_embedding import TiedWeight
from pipeline.gathered_tensors import GatheredTensors
from pipeline.mesh import Mesh


class LayerWeights:
    """The weights of one layer. copies: those for autocast. after_use: called when the weights have been released."""

    def __init__(self, layer: nn.Module, tensors: Sequence[GatheredTensors]) -> None:
        self.layer = layer
        self.tensors = list(tensors)
        self.copies: list[CastCopy] = []
        self.after_use: Callable[[], None] = lambda: None

    @contextmanager
    def used(self) -> Iterator[None]:
        """Context manager in which this rank has the weights (collective over the replicas)."""
        for tensors in self.tensors:
            tensors.gather()
        for copy in self.copies:
            copy.fill()
        try:
            yield
        finally:
            for copy in self.copies:
                copy.free()
            for tensors in self.tensors:
                tensors.release()
        self.after_use()


def divide_layer(layer: nn.Module, shards: Sequence[ParamShard], mesh: Mesh) -> LayerWeights:
    """Release the parameters of a layer that other replicas own. shards: all of its parameters."""
    tensors = []
    for expert, axis in AXES.items():
        own = [shard for shard in shards if shard.expert == expert]
        if own and dist.get_world_size(mesh.groups[axis]) > 1:
            shared = [[shard.parameter, shard.leaf] for shard in own]
            tensors.append(GatheredTensors(shared, [shard.owner for shard in own], mesh.groups[axis]))
    return LayerWeights(layer, tensors)


def divide_tied(tied: TiedWeight, weights: dict[int, LayerWeights], last: int, mesh: Mesh) -> None:
    """The same for the table of a tied embedding, which rank 0 of the replicas owns. last: the index of the head."""
    held = {index: table for index, table in ((0, tied.original), (last, tied.copy)) if table is not None}
    gathered = GatheredTensors([list(held.values())], [0], mesh.groups["dp"])
    for index in held:
        weights[index].tensors.append(gathered)
    tied.kept = mesh.dp_rank == 0
