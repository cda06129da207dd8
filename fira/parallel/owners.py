"""The owner of each trained parameter: one of the ranks that hold it.

    unsharded             rank 0 of the replicas        saves it and computes its norm
    sharded (ZeRO-1)      balanced over the replicas    also updates it, and has its moments and its gradient alone

    a b   gradients on each replica            reduce-scatter
    a .   gradients of the rank's own ones     update with the rank's moments
    a b   weights on each replica              all-gather

Rajbhandari et al. 2020, arXiv 1910.02054. Each parameter has one owner as a whole, so that norms and updates are
computed on the same numbers as without sharding, and the result is bitwise identical.
"""

import torch
from torch import Tensor

from fira.parallel.parallelize import DistributedModel, ParamShard
from pipeline.mesh import Mesh
from pipeline.owned_tensors import balanced_owners, share_owned

AXES = {False: "dp", True: "edp"}  # of the replicas, by whether the parameter is one of experts


class Owners:
    """The owners of a model's trained parameters. sharded: as described above."""

    def __init__(self, model: DistributedModel, mesh: Mesh, sharded: bool) -> None:
        self.sharded = sharded
        self.shards = model.shards
        self.groups = {expert: mesh.groups[axis] for expert, axis in AXES.items()}
        self._rank = {False: mesh.dp_rank, True: mesh.edp_rank}
        ranks = {False: mesh.layout.dp, True: mesh.layout.dp // mesh.layout.ep}
        self._owner: dict[int, int] = {}  # by the identity of the parameter
        for expert, count in ranks.items():
            shards = [shard for shard in model.shards if shard.expert == expert]
            owners = balanced_owners([shard.parameter.numel() for shard in shards], count if sharded else 1)
            tied = [o for s, o in zip(shards, owners, strict=True) if model.tied and s.parameter is model.tied.original]
            for shard, owner in zip(shards, owners, strict=True):
                # The copy of a tied weight is on other ranks, which know that the owner is rank 0.
                self._owner[id(shard.parameter)] = (owner - sum(tied)) % count
        if model.tied and model.tied.copy is not None:
            self._owner[id(model.tied.copy)] = 0

    def owner(self, parameter: Tensor) -> int:
        """The rank within the group of the parameter's replicas."""
        return self._owner[id(parameter)]

    def owns(self, shard: ParamShard) -> bool:
        """Whether this rank is the owner."""
        return self.owner(shard.parameter) == self._rank[shard.expert]

    @property
    def updated(self) -> list[ParamShard]:
        """The shards that this rank updates."""
        return [shard for shard in self.shards if not self.sharded or self.owns(shard)]

    @torch.no_grad()
    def share_weights(self) -> None:
        """Copy the updated weights of each owner to the other replicas (collective); nothing without sharding."""
        for expert, group in self.groups.items() if self.sharded else ():
            weights = [shard.parameter.detach() for shard in self.shards if shard.expert == expert]
            share_owned(weights, [self._owner[id(s.parameter)] for s in self.shards if s.expert == expert], group)
