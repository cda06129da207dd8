"""Measure one operation alternately with the MPI backend, gloo and plain mpi4py. Started by ``run.py``.

Usage: mpirun -np N python ranks.py MEASUREMENT ROUNDS OPERATION SIZES   (comma-separated sizes in bytes per rank)

MEASUREMENT is "loop" (calls one after another) or "step" (one call after other work, as in a training step).
Rank 0 prints one JSON line per size and backend: the median over rounds of the slowest rank's time per call.
"""

import json
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable

import torch
import torch.distributed as dist

import pipeline

BATCH_S = 0.003  # approximate duration of a batch of calls
PRODUCTS = 8, 24  # fewest and most matrix products before a call


def main(measurement: str, rounds: int, operation: str, sizes: list[int]) -> None:
    warnings.simplefilter("ignore", FutureWarning)  # the functions have newer names
    world = pipeline.init()
    gloo = dist.new_group(backend="gloo")
    backends = {"ours": lambda *spec: torch_call(None, *spec), "gloo": lambda *spec: torch_call(gloo, *spec)}
    backends["mpi4py"] = mpi4py_call
    for size in sizes:
        calls = {name: make(operation, size // 4) for name, make in backends.items()}
        seconds = {"loop": alternate, "step": isolated}[measurement](calls, rounds)
        if world.rank == 0:
            for name, value in seconds.items():
                record = {"measurement": measurement, "ranks": world.size, "operation": operation, "bytes": size}
                print(json.dumps(record | {"contender": name, "seconds": value}), flush=True)


def alternate(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median seconds per call. Every round measures one batch of calls per backend."""
    batch = {}
    for name, call in calls.items():
        call()
        duration = torch.tensor(timed(call, 3))
        dist.all_reduce(duration, dist.ReduceOp.MAX)
        batch[name] = max(1, min(100, int(BATCH_S / duration.item())))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            dist.barrier()
            samples[name].append(timed(call, batch[name]))
    slowest = torch.tensor(list(samples.values()), dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return {name: statistics.median(row.tolist()) for name, row in zip(samples, slowest, strict=True)}


def isolated(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median seconds of single calls, each after matrix products whose number differs between ranks.

    The time of a call is from its start on the last rank to its end on the last rank, by the clock of the machine.
    """
    torch.set_num_threads(1)
    matrix, rank = torch.ones(128, 128), dist.get_rank()
    times = torch.zeros(2, len(calls), rounds, dtype=torch.float64)  # starts and ends
    for number in range(rounds):
        generator = random.Random(number)
        counts = [generator.randint(*PRODUCTS) for _ in range(dist.get_world_size())]
        for row, call in enumerate(calls.values()):
            if number == 0:
                call()
            dist.barrier()
            for _ in range(counts[rank]):
                matrix @ matrix
            times[0, row, number] = time.perf_counter()
            call()
            times[1, row, number] = time.perf_counter()
    dist.all_reduce(times, dist.ReduceOp.MAX)
    return {name: statistics.median(row.tolist()) for name, row in zip(calls, times[1] - times[0], strict=True)}


def timed(call: Callable[[], object], repeats: int) -> float:
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - started) / repeats


def torch_call(group: dist.ProcessGroup | None, operation: str, count: int) -> Callable[[], object]:
    """Return a call of ``torch.distributed`` on ``count`` floats per rank."""
    rank, size = dist.get_rank(), dist.get_world_size()
    full, received, part = torch.ones(count), torch.empty(count), torch.empty(count // size)

    def ring() -> None:
        right = dist.P2POp(dist.isend, full, (rank + 1) % size, group)
        left = dist.P2POp(dist.irecv, received, (rank - 1) % size, group)
        for work in dist.batch_isend_irecv([right, left]):
            work.wait()

    return {
        "all_reduce": lambda: dist.all_reduce(full, dist.ReduceOp.MAX, group),
        "all_gather": lambda: dist.all_gather_into_tensor(received, part, group),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(part, full, dist.ReduceOp.MAX, group),
        "all_to_all": lambda: dist.all_to_all_single(received, full, group=group),
        "ring": ring,
    }[operation]


def mpi4py_call(operation: str, count: int) -> Callable[[], object]:
    """Return the blocking call of mpi4py, on memory that torch allocates, because numpy would use huge pages."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    rank, size = comm.Get_rank(), comm.Get_size()
    full, received, part = torch.ones(count).numpy(), torch.empty(count).numpy(), torch.empty(count // size).numpy()
    return {
        "all_reduce": lambda: comm.Allreduce(MPI.IN_PLACE, full, MPI.MAX),
        "all_gather": lambda: comm.Allgather(part, received),
        "reduce_scatter": lambda: comm.Reduce_scatter_block(full, part, MPI.MAX),
        "all_to_all": lambda: comm.Alltoall(full, received),
        "ring": lambda: comm.Sendrecv(full, (rank + 1) % size, 0, received, (rank - 1) % size, 0),
    }[operation]


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], [int(size) for size in sys.argv[4].split(",")])
