"""Jobs that end in different ways. Only rank 1 fails: `mpirun -np 2 python tests/ranks/hang_ends.py killed`."""

import os
import signal
import sys
import threading
import time

import torch
import torch.distributed as dist

import pipeline


def returned(rank: int) -> None:
    _say_sum(rank)
    if rank != 1:
        time.sleep(1)  # rank 1 is through long before the others


def destroyed(rank: int) -> None:
    _say_sum(rank)
    dist.destroy_process_group()


def thread(rank: int) -> None:
    def work() -> None:
        raise RuntimeError("in a thread")

    if rank == 1:
        threading.Thread(target=work).start()
        time.sleep(60)
    _sum(rank)


def badly_timed(rank: int) -> None:
    _sum(rank)  # rank 1's environment keeps it from getting here


def exited(rank: int) -> None:
    if rank == 1:
        sys.exit(3)
    _sum(rank)


def hard_exited(rank: int) -> None:
    if rank == 1:
        os._exit(3)
    _sum(rank)


def hard_exited_with_0(rank: int) -> None:
    if rank == 1:
        os._exit(0)
    _sum(rank)


def killed(rank: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    _sum(rank)


def _say_sum(rank: int) -> None:
    os.write(1, f"sum {int(_sum(rank))}\n".encode())  # in one piece


def _sum(rank: int) -> torch.Tensor:
    total = torch.tensor(float(rank))
    dist.all_reduce(total)
    return total


if __name__ == "__main__":
    assert not {"MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE"} & set(os.environ)
    if sys.argv[1] == "badly_timed" and "1" in {os.environ.get(name) for name in ("PMI_RANK", "OMPI_COMM_WORLD_RANK")}:
        os.environ["PIPELINE_MPI_TIMEOUT_S"] = "abc"
    globals()[sys.argv[1]](pipeline.init().rank)
