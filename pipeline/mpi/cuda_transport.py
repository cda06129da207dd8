"""Selection of the transport for CUDA tensors: NCCL if possible, otherwise MPI."""

import ctypes
import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from mpi4py import MPI
from torch.distributed import distributed_c10d

from pipeline.mpi.buffers import as_bytes


def choose_transport(local_rank: int, cuda: bool = True) -> tuple[str | None, bool]:
    """Choose how CUDA tensors are transported in the default group. Collective over the world.

    The local ranks use the machine's devices in round-robin order. CUDA is initialised only if the MPI library reports
    that it can access device memory, because the devices that the program will use are not known yet.

    Args:
        local_rank: rank of this process on its machine.
        cuda: whether the program may use CUDA.

    Returns:
        The backend for CUDA tensors, None without CUDA; and whether MPI may access device memory.
    """
    if cuda and MPI.COMM_WORLD.Get_size() > 1 and dist.is_nccl_available():
        # A kernel that is loaded at its first use waits for running ones, which may wait for another rank.
        os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")  # read when CUDA is initialised
    count = torch.cuda.device_count() if cuda else 0
    if not any(MPI.COMM_WORLD.allgather(count)):
        return None, False
    own = [torch.device("cuda", local_rank % count)] if count else []
    return _common_backend([_physical_name(device) for device in own]), is_cuda_aware(own)


def _physical_name(device: torch.device) -> str:
    """Name of a device that is unique in the job, without initialising CUDA."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    name = visible[device.index] if device.index < len(visible) else ""
    return f"{MPI.Get_processor_name()} {name.strip() or device.index}"


def machines() -> list[str]:
    """Return the name of each rank's machine. Collective over the world."""
    return MPI.COMM_WORLD.allgather(MPI.Get_processor_name())


def cuda_backend(devices: Sequence[torch.device]) -> str:
    """Return the backend for groups whose ranks use these devices, "nccl" or "mpi". Collective over the world.

    Args:
        devices: the devices of this rank.
    """
    own = [device for device in devices if device.type == "cuda"]
    return _common_backend([str(torch.cuda.get_device_properties(device).uuid) for device in own])


def _common_backend(devices: list[str]) -> str:
    """Return "nccl" if all ranks have devices and none is used twice, otherwise "mpi". Collective over the world.

    NCCL rejects a device that two of its ranks share, and not every build of PyTorch has NCCL.
    """
    by_rank = MPI.COMM_WORLD.allgather(devices if dist.is_nccl_available() else [])
    used = [device for rank in by_rank for device in rank]
    return "nccl" if all(by_rank) and len(set(used)) == len(used) else "mpi"


def destroy_nccl_groups() -> None:
    """Destroy the groups that use NCCL, the default group last. Collective over the world.

    Otherwise NCCL's threads would call the store after it has been closed, and might hang or abort.
    """
    for group in reversed(list(distributed_c10d._world.pg_map)):
        if "nccl" in dist.get_backend_config(group):
            dist.destroy_process_group(group)


def is_cuda_aware(devices: Sequence[torch.device]) -> bool:
    """Return whether MPI can read and write device memory on every rank. Collective over the world.

    The library is queried first, because a library without support would crash. Then a test message must arrive intact.

    Args:
        devices: the devices of this rank.
    """
    comm = MPI.COMM_WORLD
    if not all(comm.allgather(bool(devices) and _claims_cuda())):
        return False
    torch.cuda.set_device(devices[0])  # before the first CUDA call, so that there is no context on device 0
    sent = torch.full((1024,), comm.Get_rank(), dtype=torch.int32, device=devices[0])
    received = torch.full_like(sent, -1)
    torch.cuda.synchronize(devices[0])
    left, right = (comm.Get_rank() - 1) % comm.Get_size(), (comm.Get_rank() + 1) % comm.Get_size()
    comm.Sendrecv(as_bytes(sent), right, 0, as_bytes(received), left, 0)
    return all(comm.allgather(bool((received == left).all())))


def _claims_cuda() -> bool:
    """Return whether the MPI library reports CUDA support. MPICH and Open MPI share the function for this query."""
    query = getattr(ctypes.CDLL(MPI.__file__), "MPIX_Query_cuda_support", None)
    return query is not None and query() == 1
