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
from typing import cast

import torch
import torch.distributed as dist

from pipeline.messages import Channel, channels_of


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

    def group(self, axis: str, rank: int) -> list[int]:
        """The ranks that differ from `rank` along one axis only: "pp", "dp", "ep", or "edp" (replicas of one expert).

        Other groups are not enumerated, so that the time does not grow with the size of the world.
        """
        dp_rank = rank % self.dp
        stage, expert = rank - dp_rank, rank - dp_rank % self.ep  # first ranks of the groups along dp and ep
        by_axis = {
            "pp": range(dp_rank, self.world, self.dp),
            "dp": range(stage, stage + self.dp),
            "ep": range(expert, expert + self.ep),
            "edp": range(stage + dp_rank % self.ep, stage + self.dp, self.ep),
        }
        return list(by_axis[axis])


@dataclass(frozen=True)
class Mesh:
    """The coordinates of this rank in a layout, and its process groups.

    groups: by axis; "pp" carries collectives over the ranks of a pipeline, "dp" and "edp" carry reductions.
    ep_groups[j]: for the layers on this rank's j-th local device; each device has a group of its own, because
    torchgpipe runs the devices in different threads. channels: those from and to this rank, with their groups.
    ep_between_machines: whether the ep group has GPUs of several machines.
    """

    layout: Layout
    rank: int
    groups: dict[str, dist.ProcessGroup]
    ep_groups: list[dist.ProcessGroup]
    channels: dict[Channel, dist.ProcessGroup]
    device_type: str = "cpu"
    ep_between_machines: bool = False

    @property
    def separates_sources(self) -> bool:
        """Whether experts on several ranks compute the rows of each sending rank separately, for exact results.

        On a CPU this takes no longer than computing them together; on a GPU it would multiply the number of kernels.
        """
        return self.layout.ep > 1 and self.device_type == "cpu"

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


def make_mesh(layout: Layout, placement: Sequence[int], devices: Sequence[torch.device] = (CPU,)) -> Mesh:
    """Create this rank's process groups and connect their members (collective over the world).

    placement: the pipeline rank of each stage. devices: the local devices of this rank. Groups for the CPU use the
    default backend, groups for CUDA use NCCL, or MPI where ranks share a device. Only the members of a group take part
    in its creation, so the time does not grow with the number of groups in the world.
    Raises ValueError when the size of the world differs from that of the layout.
    """
    if dist.get_world_size() != layout.world:
        raise ValueError(f"{layout} needs {layout.world} ranks, but the job has {dist.get_world_size()}")
    rank, backend, ep_between_machines = dist.get_rank(), None, False
    if devices[0].type == "cuda":
        from pipeline.mpi.cuda_transport import cuda_backend, machines  # here, because it loads MPI

        backend, names = cuda_backend(devices), machines()
        ep_between_machines = len({names[member] for member in layout.group("ep", rank)}) > 1

    def new_group(ranks: list[int], description: str) -> dist.ProcessGroup:
        group = dist.new_group(ranks, backend=backend, use_local_synchronization=True, group_desc=description)
        return cast(dist.ProcessGroup, group)

    def axis_group(axis: str) -> dist.ProcessGroup:
        return new_group(layout.group(axis, rank), axis)

    pipeline = layout.group("pp", rank)
    channels = channels_of(placement, pipeline.index(rank))
    mesh = Mesh(
        layout,
        rank,
        {axis: axis_group(axis) for axis in ("pp", "dp", "edp")},
        [axis_group("ep") for _ in devices],
        {c: new_group([pipeline[c.source], pipeline[c.destination]], str(c)) for c in channels},
        devices[0].type,
        ep_between_machines,
    )
    _connect(mesh, devices)
    return mesh


def _connect(mesh: Mesh, devices: Sequence[torch.device]) -> None:
    """Use every group once on each device that it serves, in the same order on all ranks.

    NCCL creates a communicator when it is first used, and blocks the host until all its ranks have come. During a step
    that is a deadlock: a rank that posts a receive ahead would wait for a peer that waits for this rank's next message.
    """
    probe = torch.zeros(1, device=devices[0])
    for device, ep_group in zip(devices, mesh.ep_groups, strict=True):
        for group in (*mesh.groups.values(), ep_group):
            dist.all_reduce(probe.to(device), group=group)
    for channel, group in mesh.channels.items():
        other = 1 - dist.get_rank(group)
        if channel.source == mesh.pp_rank:
            dist.send(probe, group=group, group_dst=other)
        else:
            dist.recv(probe, group=group, group_src=other)
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
