"""Jobs that hang, for one reason per function: `mpirun -np 2 python tests/ranks/hang_ranks.py stopped`."""

import os
import signal
import sys
import time

import torch
import torch.distributed as dist

import pipeline
from pipeline.mpi.activity import doing


def skipped_collective(rank: int) -> None:
    ep = dist.new_group(group_desc="ep")
    if rank == 0:
        dist.send(torch.zeros(7), dst=1, group=ep)
    else:
        dist.recv(torch.zeros(7), src=0, group=ep)
        time.sleep(60)  # arrives too late
    dist.all_to_all_single(torch.zeros(4, 1024), torch.zeros(4, 1024), group=ep)


def computing(rank: int) -> None:
    while rank == 1:
        pass
    dist.barrier()


def finished(rank: int) -> None:
    if rank == 0:
        dist.all_reduce(torch.zeros(4))


def wrong_shape(rank: int) -> None:
    dist.all_reduce(torch.zeros(4 if rank else 8))  # MPICH may compute a wrong result without an error
    dist.recv(torch.zeros(1), src=1 - rank)


def wrong_order(rank: int) -> None:
    if rank == 0:
        dist.broadcast(torch.zeros(4), src=0)
        dist.all_reduce(torch.zeros(4))
    else:
        dist.all_reduce(torch.zeros(4))
        dist.broadcast(torch.zeros(4), src=0)


def receive_without_send(rank: int) -> None:
    if rank == 0:
        dist.recv(torch.zeros(3), src=1, tag=5)
    else:
        dist.barrier()


def no_new_group(rank: int) -> None:
    if rank == 0:
        dist.new_group()


def incomplete_future(rank: int) -> None:
    """Wait in C++ as DistributedDataParallel does."""
    if rank == 0:
        dist.all_reduce(torch.zeros(4), async_op=True).get_future().wait()


def stopped(rank: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    dist.barrier()


def stopped_first(rank: int) -> None:
    if rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    dist.barrier()


def gone(rank: int) -> None:
    dist.barrier()
    if rank == 1:
        time.sleep(0.5)  # a rank that is still in init() could not report
        os._exit(3)
    dist.barrier()


def killed(rank: int) -> None:
    with doing(f"waiting for rank {1 - rank}"):
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.barrier()


def exit_awaited(rank: int) -> None:
    dist.barrier()
    while rank == 1:
        pass


def long_activity(rank: int) -> None:
    """Work for longer than the timeout, which is 3 s, first in Python, then with the global interpreter lock held."""
    if rank == 1:
        with doing("data preparation", long=True):
            end = time.monotonic() + 4
            while time.monotonic() < end:
                pass
            sum(range(100_000_000))
    dist.barrier()


def long_activity_idle(rank: int) -> None:
    if rank == 1:
        with doing("data preparation", long=True):
            time.sleep(60)
    dist.barrier()


def long_activity_stopped(rank: int) -> None:
    if rank == 1:
        with doing("data preparation", long=True):
            os.kill(os.getpid(), signal.SIGSTOP)
    dist.barrier()


def raised(rank: int) -> None:
    dist.all_reduce(torch.zeros(1))  # both ranks have started
    if rank == 1:
        time.sleep(1.5)  # rank 0 waits in the barrier by then
        raise RuntimeError("no more data")
    dist.barrier()


def requested(rank: int) -> None:
    dist.barrier()
    if rank == 0:
        os.kill(os.getpid(), signal.SIGUSR2)
        time.sleep(2)
    dist.barrier()


if __name__ == "__main__":
    globals()[sys.argv[1]](pipeline.init().rank)
