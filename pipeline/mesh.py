"""The mesh of ranks with its axes pp, dp, ep and edp, and the process groups along them.

    world = pp · dp                        dp = edp · ep: ep divides dp
    rank = pp_rank · dp + dp_rank          dp_rank = edp_rank · ep + ep_rank

    pp 2, dp 4, ep 2          edp_rank 0   edp_rank 1
        pp_rank 0             ranks 0 1    ranks 2 3      ep groups: 0 1, 2 3, 4 5, 6 7
        pp_rank 1             ranks 4 5    ranks 6 7      edp groups: 0 2, 1 3, 4 6, 5 7

Consecutive ranks share a node. The heavy traffic of dp and ep therefore stays inside nodes where possible, and only
messages between pipeline stages cross nodes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Layout:
    """The size of each axis: pipeline ranks, data-parallel replicas, and ranks that the experts are sharded over."""

    pp: int = 1
    dp: int = 1
    ep: int = 1

    def __post_init__(self) -> None:
        if min(self.pp, self.dp, self.ep) < 1 or self.dp % self.ep:
            raise ValueError(
                f"pp {self.pp}, dp {self.dp}, ep {self.ep}: each must be at least 1, and ep must divide dp"
            )

    @property
    def world(self) -> int:
        return self.pp * self.dp

    def __str__(self) -> str:
        return f"pp {self.pp} × dp {self.dp} (ep {self.ep})"

    def grid(self) -> torch.Tensor:
        """The ranks as a tensor [pp, edp, ep]."""
        return torch.arange(self.world).view(self.pp, self.dp // self.ep, self.ep)

    def groups(self, axis: str) -> list[list[int]]:
        """The sets of ranks that differ along one axis only: "pp", "dp", "ep", or "edp" (replicas of one expert)."""
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
    """The coordinates of this rank in a layout, and its process groups.

    groups: by name. "pp" carries activations and "pp_backward" gradients, since NCCL can deadlock when one communicator
    has traffic in both directions; "dp" and "edp" carry reductions. ep_groups[j]: for the layers on this rank's j-th
    local device; each device has a group of its own, because torchgpipe runs the devices in different threads.
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
    """Create the process groups of a layout (collective over the world).

    devices: the local devices of this rank. Groups for the CPU use the default backend, groups for CUDA use NCCL, or
    MPI where ranks share a device. Raises ValueError when the size of the world differs from that of the layout.
    """
    if dist.get_world_size() != layout.world:
        raise ValueError(f"{layout} needs {layout.world} ranks, but the job has {dist.get_world_size()}")
    backend = None
    if devices[0].type == "cuda":
        from pipeline.mpi.cuda_transport import cuda_backend  # here, because it loads MPI

        backend = cuda_backend(devices)

    def group(axis: str) -> dist.ProcessGroup:
        return dist.new_subgroups_by_enumeration(layout.groups(axis), backend=backend, group_desc=axis)[0]

    groups = {name: group(axis) for name, axis in (("pp", "pp"), ("pp_backward", "pp"), ("dp", "dp"), ("edp", "edp"))}
    return Mesh(layout, dist.get_rank(), groups, [group("ep") for _ in devices], devices[0].type)
