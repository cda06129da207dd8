"""What the owners of parameters do for the other replicas, see `fira/parallel/param_shard.py`.

a b   gradients on each replica            reduce-scatter
a .   gradients of the rank's own ones     update with the rank's moments
a b   weights on each replica              all-gather, unless they are gathered in each use of their layer
"""

import torch
from torch import Tensor

from fira.parallel.parallelize import DistributedModel
from fira.parallel.param_shard import AXES, ParamShard, replica_rank
from pipeline.mesh import Mesh
from pipeline.owned_tensors import share_owned


class Owners:
    """The owners of a model's trained parameters. sharded: whether the replicas divide the updates."""

    def __init__(self, model: DistributedModel, mesh: Mesh) -> None:
        self.sharded = model.shard is not None
        self.shards = model.shards
        self.groups = {expert: mesh.groups[axis] for expert, axis in AXES.items()}
        self._mesh, self._shares = mesh, self.sharded and not model.weights
        self._owner = {id(shard.parameter): shard.owner for shard in model.shards}
        if model.tied and model.tied.copy is not None:
            self._owner[id(model.tied.copy)] = 0

    def owner(self, parameter: Tensor) -> int:
        """The rank within the group of the parameter's replicas."""
        return self._owner[id(parameter)]

    def owns(self, shard: ParamShard) -> bool:
        """Whether this rank is the owner."""
        return shard.owner == replica_rank(self._mesh, shard.expert)

    @property
    def updated(self) -> list[ParamShard]:
        """The shards that this rank updates."""
        return [shard for shard in self.shards if not self.sharded or self.owns(shard)]

    @torch.no_grad()
    def share_weights(self) -> None:
        """Copy the updated weights of each owner to the replicas that keep them (collective)."""
        for expert, group in self.groups.items() if self._shares else ():
            shards = [shard for shard in self.shards if shard.expert == expert]
            share_owned([shard.parameter.detach() for shard in shards], [shard.owner for shard in shards], group)
