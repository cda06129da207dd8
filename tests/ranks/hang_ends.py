"""Jobs in which only rank 1 fails, in different ways: `mpirun -np 2 python tests/ranks/hang_ends.py killed`."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist

import pipeline


def returned(rank: int) -> None:
    _print_sum(rank)
    if rank != 1:
        time.sleep(1)  # rank 1 ends long before the others


def destroyed(rank: int) -> None:
    _print_sum(rank)
    dist.destroy_process_group()


def unresponsive(rank: int) -> None:
    """Rank 0 ends last and cannot answer before, because it holds the global interpreter lock."""
    _print_sum(rank)
    if rank == 0:
        sum(range(300_000_000))


def thread(rank: int) -> None:
    def work() -> None:
        raise RuntimeError("in a thread")

    if rank == 1:
        threading.Thread(target=work).start()
        time.sleep(60)
    _sum(rank)


def badly_timed(rank: int) -> None:
    _sum(rank)  # not reached by rank 1, whose environment is invalid


def exited(rank: int) -> None:
    if rank == 1:
        sys.exit(3)
    _sum(rank)


def exited_without_hook(rank: int) -> None:
    if rank == 1:
        raise SystemExit(3)
    _sum(rank)


@pipeline.abort_on_failure()
def exited_in_context(rank: int) -> None:
    if rank == 1:
        raise SystemExit(3)
    time.sleep(60)  # does not wait for rank 1


def exited_in_thread(rank: int) -> None:
    if rank == 1:
        thread = threading.Thread(target=sys.exit, args=[3])  # ends the thread only
        thread.start()
        thread.join()
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


def failed_with_killed(rank: int) -> None:
    pids = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(pids, torch.tensor([os.getpid()]))
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    while Path(f"/proc/{int(pids[1])}/exe").exists():  # not of a process that has ended
        time.sleep(0.001)
    raise RuntimeError("an operation with rank 1 failed")


def ended_before_init(rank: int) -> None:
    _sum(rank)  # not reached by rank 1


def _print_sum(rank: int) -> None:
    os.write(1, f"sum {int(_sum(rank))}\n".encode())  # one write, so that the ranks' lines do not mix


def _sum(rank: int) -> torch.Tensor:
    total = torch.tensor(float(rank))
    dist.all_reduce(total)
    return total


if __name__ == "__main__":
    assert not {"MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE"} & set(os.environ)
    if "1" in {os.environ.get(name) for name in ("PMI_RANK", "OMPI_COMM_WORLD_RANK")}:
        if sys.argv[1] == "badly_timed":
            os.environ["PIPELINE_MPI_TIMEOUT_S"] = "abc"
        if sys.argv[1] == "ended_before_init":
            pipeline.abort_on_failure().__enter__()
            os._exit(0)
    globals()[sys.argv[1]](pipeline.init().rank)
