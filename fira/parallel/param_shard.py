"""The parameters and buffers of a model, and this rank's shards of them.

Each parameter has an owner, one of the ranks that hold it:

    --shard       the owner is               and it
    (none)        rank 0 of the replicas     saves the parameter and computes its norm
    optimizer     balanced over replicas     also updates it, and has its moments and its gradient alone (ZeRO-1)
    parameters    balanced over replicas     also keeps its values between the uses of its layer (ZeRO-3)

Rajbhandari et al. 2020, arXiv 1910.02054. A parameter has one owner as a whole, so that norms and updates are computed
on the same numbers as without sharding, and the results are bitwise identical.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from pipeline.mesh import Mesh
from pipeline.owned_tensors import balanced_owners

AXES = {False: "dp", True: "edp"}  # of the replicas, by whether the parameter is one of experts


class GlobalTensor(NamedTuple):
    """A parameter or buffer of the whole model. expert: whether dim 0 counts experts."""

    name: str
    shape: tuple[int, ...]
    expert: bool

    @property
    def layer(self) -> int:
        """The index of its layer."""
        return layer_of(self.name)


@dataclass(frozen=True)
class ParamShard:
    """This rank's shard of a parameter or buffer: the rows from `start` of a tensor of global shape `shape`.

    expert: dim 0 counts experts and is sharded over ep. Any other tensor is replicated on all ranks of a stage, and its
    shard is the whole tensor.
    leaf: the tensor for which autograd computes gradients; the parameter itself, or for experts on R ranks its
    expansion [R, …] with one gradient per sending rank, see `AllToAllDispatcher`.
    owner: the owner's rank among the replicas. kept: whether this rank has the values between uses of the layer.
    """

    name: str
    parameter: Tensor
    start: int
    shape: tuple[int, ...]
    expert: bool
    leaf: Tensor
    owner: int = 0
    kept: bool = True

    @property
    def is_matrix(self) -> bool:
        """Whether the parameter, or each expert's slice of it, is a matrix."""
        return len(self.shape) - self.expert >= 2

    @property
    def layer(self) -> int:
        """The index of its layer."""
        return layer_of(self.name)


def layer_of(name: str) -> int:
    """The index of the layer of a parameter with this global name."""
    return int(name.split(".")[1])


def replica_rank(mesh: Mesh, expert: bool) -> int:
    """This rank's number among the ranks that hold the same parameters."""
    return mesh.edp_rank if expert else mesh.dp_rank


def find_owners(tensors: Sequence[GlobalTensor], mesh: Mesh, shard: str | None, table: str | None) -> dict[str, int]:
    """The owner of each tensor of this rank's layers, by name.

    table: the name of a tied embedding. Its copy is on other ranks, which know that the owner is rank 0.
    """
    result: dict[str, int] = {}
    for expert, ranks in ((False, mesh.layout.dp), (True, mesh.layout.dp // mesh.layout.ep)):
        names = [tensor.name for tensor in tensors if tensor.expert == expert]
        sizes = [math.prod(tensor.shape) for tensor in tensors if tensor.expert == expert]
        owners = dict(zip(names, balanced_owners(sizes, ranks if shard else 1), strict=True))
        first = owners.get(table or "", 0)
        result |= {name: (owner - first) % ranks for name, owner in owners.items()}
    return result
