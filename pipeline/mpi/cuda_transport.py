"""Which way CUDA tensors go: by NCCL where it can, else by MPI. Nothing here is asked on machines without CUDA."""

import ctypes
from collections.abc import Sequence

import torch
import torch.distributed as dist
from mpi4py import MPI


def ways(local_rank: int) -> tuple[str | None, bool]:
    """The backend for CUDA in the default group, None without CUDA, and whether MPI may see device memory. Collective.

    The local ranks take the machine's devices in turn.
    """
    count = torch.cuda.device_count()
    if not any(MPI.COMM_WORLD.allgather(count)):
        return None, False
    own = [torch.device("cuda", local_rank % count)] if count else []
    return cuda_backend(own), is_cuda_aware(own)


def cuda_backend(devices: Sequence[torch.device]) -> str:
    """The backend for groups whose ranks use these devices, "nccl" or "mpi". Collective over the world.

    NCCL refuses a device that two of its ranks share, and there are machines without NCCL.
    """
    own = [str(torch.cuda.get_device_properties(device).uuid) for device in devices if device.type == "cuda"]
    everyone = MPI.COMM_WORLD.allgather(own if dist.is_nccl_available() else [])
    used = [device for rank in everyone for device in rank]
    return "nccl" if all(everyone) and len(set(used)) == len(used) else "mpi"


def is_cuda_aware(devices: Sequence[torch.device]) -> bool:
    """Does MPI read and write device memory, on every rank? Collective over the world; ``devices``: this rank's.

    The library is asked first, because one that does not would crash; then a message has to arrive as it was sent.
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
    """What the MPI library says of itself: MPICH and Open MPI have the same call for it."""
    query = getattr(ctypes.CDLL(MPI.__file__), "MPIX_Query_cuda_support", None)
    return query is not None and query() == 1
