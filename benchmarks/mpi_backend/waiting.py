"""Benchmark of waiting: latency of a single message, and slowdown of ranks that compute while others wait.

    mpirun -np 2 python benchmarks/mpi_backend/waiting.py    # a round trip of 8 bytes
    mpirun -np 4 python benchmarks/mpi_backend/waiting.py    # on two cores: two ranks compute, two wait

Prints medians over rounds, each of which measures every backend.
"""

import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from mpi4py import MPI

import pipeline

ROUNDS = 15
COMPUTE_S = 0.3
TRIPS = 200


def main() -> None:
    world = pipeline.init()
    torch.set_num_threads(1)
    gloo = dist.new_group(backend="gloo")
    if world.size == 2:
        backends = {"ours": trips(trip(None)), "gloo": trips(trip(gloo)), "mpi4py": trips(trip_mpi4py)}
        unit = "µs per message, one way"
    else:
        calls = {"ours": collective(None), "gloo": collective(gloo), "mpi4py": MPI.COMM_WORLD.Barrier}
        backends = {name: products(call, call) for name, call in calls.items()}
        backends["no waiting"] = products(lambda: None, lambda: time.sleep(COMPUTE_S))
        unit = "matrix products per millisecond, all ranks together"
    samples = torch.empty(len(backends), ROUNDS, dtype=torch.float64)
    for number in range(ROUNDS):
        for row, backend in zip(samples, backends.values(), strict=True):
            dist.barrier()
            row[number] = backend()
    dist.all_reduce(samples, dist.ReduceOp.AVG if world.size == 2 else dist.ReduceOp.SUM)
    if world.rank == 0:
        for name, row in zip(backends, samples.tolist(), strict=True):
            print(f"{name}: {statistics.median(row):.2f} {unit}")


def products(meet: Callable[[], object], wait: Callable[[], object]) -> Callable[[], float]:
    """Measure the products of the first half of the ranks, while the second half waits.

    The first half calls ``meet`` after its products, the second half calls ``wait`` immediately.
    """

    def measure() -> float:
        if dist.get_rank() >= dist.get_world_size() // 2:
            wait()
            return 0.0
        matrix, done, started = torch.ones(128, 128), 0, time.perf_counter()
        while (elapsed := time.perf_counter() - started) < COMPUTE_S:
            matrix @ matrix
            done += 1
        meet()
        return done / elapsed / 1000

    return measure


def collective(group: dist.ProcessGroup | None) -> Callable[[], object]:
    def all_reduce() -> None:
        dist.all_reduce(torch.ones(1), group=group)

    return all_reduce


def trips(call: Callable[[bool], object]) -> Callable[[], float]:
    """Measure round trips. ``call`` sends if its argument is True, otherwise it receives."""

    def measure() -> float:
        first = dist.get_rank() == 0
        started = time.perf_counter()
        for _ in range(TRIPS):
            call(first)
            call(not first)
        return (time.perf_counter() - started) / TRIPS / 2 * 1e6

    return measure


def trip(group: dist.ProcessGroup | None) -> Callable[[bool], object]:
    message, peer = torch.ones(2), 1 - dist.get_rank()
    return lambda send: (dist.send if send else dist.recv)(message, peer, group=group)


def trip_mpi4py(send: bool) -> None:
    message, peer, world = bytearray(8), 1 - MPI.COMM_WORLD.Get_rank(), MPI.COMM_WORLD
    (world.Send if send else world.Recv)(message, peer)


if __name__ == "__main__":
    main()
