"""Time one call of each operation: ours, gloo's and raw mpi4py's, alternated. Started by ``run.py``, see there.

Usage: mpirun -np N python ranks.py ROUNDS OPERATION SIZES   (comma-separated; a size is one rank's data in bytes)

Rank 0 prints a JSON line per size and contender: the median over rounds of the slowest rank's time.
"""

import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable

import torch
import torch.distributed as dist

import pipeline

BATCH_S = 0.003  # calls are timed in batches of about this long


def main(rounds: int, operation: str, sizes: list[int]) -> None:
    warnings.simplefilter("ignore", FutureWarning)  # newer names for what is called here by the older ones
    world = pipeline.init()
    gloo = dist.new_group(backend="gloo")
    contenders = {"ours": lambda *spec: torch_call(None, *spec), "gloo": lambda *spec: torch_call(gloo, *spec)}
    contenders["mpi4py"] = mpi4py_call
    for size in sizes:
        calls = {name: make(operation, size // 4) for name, make in contenders.items()}
        seconds = alternate(calls, rounds)
        if world.rank == 0:
            for name, value in seconds.items():
                record = {"ranks": world.size, "operation": operation, "bytes": size, "who": name}
                print(json.dumps(record | {"seconds": value}), flush=True)


def alternate(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds per call; in every round each contender gets a batch of the same length."""
    batch = {}
    for name, call in calls.items():
        call()
        once = torch.tensor(timed(call, 3))
        dist.all_reduce(once, dist.ReduceOp.MAX)
        batch[name] = max(1, min(100, int(BATCH_S / once.item())))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            dist.barrier()
            samples[name].append(timed(call, batch[name]))
    slowest = torch.tensor(list(samples.values()), dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return {name: statistics.median(row.tolist()) for name, row in zip(samples, slowest, strict=True)}


def timed(call: Callable[[], object], repeats: int) -> float:
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - began) / repeats


def torch_call(group: dist.ProcessGroup | None, operation: str, count: int) -> Callable[[], object]:
    """The operation by ``torch.distributed``'s public interface; ``count`` floats per rank."""
    rank, size = dist.get_rank(), dist.get_world_size()
    one, other, part = torch.ones(count), torch.empty(count), torch.empty(count // size)

    def ring() -> None:
        right = dist.P2POp(dist.isend, one, (rank + 1) % size, group)
        left = dist.P2POp(dist.irecv, other, (rank - 1) % size, group)
        for work in dist.batch_isend_irecv([right, left]):
            work.wait()

    return {
        "all_reduce": lambda: dist.all_reduce(one, dist.ReduceOp.MAX, group),
        "all_gather": lambda: dist.all_gather_into_tensor(other, part, group),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(part, one, dist.ReduceOp.MAX, group),
        "all_to_all": lambda: dist.all_to_all_single(other, one, group=group),
        "ring": ring,
    }[operation]


def mpi4py_call(operation: str, count: int) -> Callable[[], object]:
    """The same by mpi4py's own, blocking calls, on memory that torch allocated: numpy would take huge pages."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    rank, size = comm.Get_rank(), comm.Get_size()
    one, other, part = torch.ones(count).numpy(), torch.empty(count).numpy(), torch.empty(count // size).numpy()
    return {
        "all_reduce": lambda: comm.Allreduce(MPI.IN_PLACE, one, MPI.MAX),
        "all_gather": lambda: comm.Allgather(part, other),
        "reduce_scatter": lambda: comm.Reduce_scatter_block(one, part, MPI.MAX),
        "all_to_all": lambda: comm.Alltoall(one, other),
        "ring": lambda: comm.Sendrecv(one, (rank + 1) % size, 0, other, (rank - 1) % size, 0),
    }[operation]


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], [int(size) for size in sys.argv[3].split(",")])
