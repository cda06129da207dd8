"""Selection of the transport for CUDA tensors: NCCL if possible, otherwise MPI."""

import ctypes
from collections.abc import Sequence

import torch
import torch.distributed as dist
from mpi4py import MPI


def choose_transport(local_rank: int) -> tuple[str | None, bool]:
    """Choose how CUDA tensors are transported in the default group. Collective over the world.

    The local ranks use the machine's devices in round-robin order.

    Returns:
        The backend for CUDA tensors, None without CUDA; and whether MPI may access device memory.
    """
    count = torch.cuda.device_count()
    if not any(MPI.COMM_WORLD.allgather(count)):
        return None, False
    own = [torch.device("cuda", local_rank % count)] if count else []
    return cuda_backend(own), is_cuda_aware(own)


def cuda_backend(devices: Sequence[torch.device]) -> str:
    """Return the backend for groups whose ranks use these devices, "nccl" or "mpi". Collective over the world.

    NCCL rejects a device that two of its ranks share, and not every build of PyTorch has NCCL.

    Args:
        devices: the devices of this rank.
    """
    own = [str(torch.cuda.get_device_properties(device).uuid) for device in devices if device.type == "cuda"]
    by_rank = MPI.COMM_WORLD.allgather(own if dist.is_nccl_available() else [])
    used = [device for rank in by_rank for device in rank]
    return "nccl" if all(by_rank) and len(set(used)) == len(used) else "mpi"


def is_cuda_aware(devices: Sequence[torch.device]) -> bool:
    """Return whether MPI can read and write device memory on every rank. Collective over the world.

    The library is queried first, because a library without support would crash. Then a test message must arrive intact.

    Args:
        devices: the devices of this rank.
    """
    comm = MPI.COMM_WORLD
    if not all(comm.allgather(bool(devices) and _claims_cuda())):
        return False
    sent = torch.full((1024,), comm.Get_rank(), dtype=torch.int32, device=devices[0])
    received = torch.full_like(sent, -1)
    torch.cuda.synchronize(devices[0])
    left, right = (comm.Get_rank() - 1) % comm.Get_size(), (comm.Get_rank() + 1) % comm.Get_size()
    buffers = [[MPI.memory.fromaddress(tensor.data_ptr(), tensor.nbytes), MPI.BYTE] for tensor in (sent, received)]
    comm.Sendrecv(buffers[0], right, 0, buffers[1], left, 0)
    return all(comm.allgather(bool((received == left).all())))


def _claims_cuda() -> bool:
    """Return whether the MPI library reports CUDA support. MPICH and Open MPI share the function for this query."""
    query = getattr(ctypes.CDLL(MPI.__file__), "MPIX_Query_cuda_support", None)
    return query is not None and query() == 1
