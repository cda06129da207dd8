"""Where a rank stands: world = pp × dp, and ep divides dp.

rank = pp_rank · dp + dp_rank and dp_rank = edp_rank · ep + ep_rank. Neighbours in rank order share a node, so the
traffic of dp and ep, which is the heavy one, stays inside a node where it can; the pipeline crosses nodes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Layout:
    """How many ways the job is split: pipeline stages, data-parallel replicas, expert shards inside the replicas."""

    pp: int = 1
    dp: int = 1
    ep: int = 1

    def __post_init__(self) -> None:
        if min(self.pp, self.dp, self.ep) < 1 or self.dp % self.ep:
            raise ValueError(f"pp {self.pp}, dp {self.dp}, ep {self.ep}: each is at least 1 and ep divides dp")

    @property
    def world(self) -> int:
        return self.pp * self.dp

    def __str__(self) -> str:
        return f"pp {self.pp} × dp {self.dp} (ep {self.ep})"

    def grid(self) -> torch.Tensor:
        """The ranks as [pp, edp, ep]."""
        return torch.arange(self.world).view(self.pp, self.dp // self.ep, self.ep)

    def groups(self, axis: str) -> list[list[int]]:
        """The sets of ranks that differ along one axis only: "pp", "dp", "ep", or "edp" (replicas of an expert)."""
        grid = self.grid()
        by_axis = {
            "pp": grid.flatten(1).T,
            "dp": grid.flatten(1),
            "ep": grid.flatten(0, 1),
            "edp": grid.transpose(1, 2).flatten(0, 1),
        }
        return by_axis[axis].tolist()


@dataclass(frozen=True)
class Mesh:
    """This rank's place in a layout, and its process groups by axis.

    `pp` carries activations and `pp_backward` gradients: with NCCL, traffic in both directions over one communicator
    can wait for itself. `ep_groups[j]` is for the layers on a rank's j-th local device, which has a thread of its own.
    """

    layout: Layout
    rank: int
    groups: dict[str, dist.ProcessGroup]
    ep_groups: list[dist.ProcessGroup]
    device_type: str = "cpu"

    @property
    def pp_rank(self) -> int:
        return self.rank // self.layout.dp

    @property
    def dp_rank(self) -> int:
        return self.rank % self.layout.dp

    @property
    def ep_rank(self) -> int:
        return self.dp_rank % self.layout.ep

    @property
    def edp_rank(self) -> int:
        return self.dp_rank // self.layout.ep


CPU = torch.device("cpu")


def make_mesh(layout: Layout, devices: Sequence[torch.device] = (CPU,)) -> Mesh:
    """Create the process groups of a layout. Collective over the world, whose size must be the layout's.

    `devices`: this rank's own. CPU groups use the default backend; CUDA groups NCCL, or MPI where ranks share a device.
    """
    if dist.get_world_size() != layout.world:
        raise ValueError(f"{layout} needs {layout.world} ranks, there are {dist.get_world_size()}")
    backend = None
    if devices[0].type == "cuda":
        from pipeline.mpi.cuda_transport import cuda_backend  # loads MPI

        backend = cuda_backend(devices)

    def group(axis: str) -> dist.ProcessGroup:
        return dist.new_subgroups_by_enumeration(layout.groups(axis), backend=backend, group_desc=axis)[0]

    groups = {name: group(axis) for name, axis in (("pp", "pp"), ("pp_backward", "pp"), ("dp", "dp"), ("edp", "edp"))}
    return Mesh(layout, dist.get_rank(), groups, [group("ep") for _ in devices], devices[0].type)
