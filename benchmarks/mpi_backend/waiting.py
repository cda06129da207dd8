"""What waiting costs: those who compute meanwhile, and a lone message.

    mpirun -np 4 python benchmarks/mpi_backend/waiting.py    # on two cores: two ranks compute, two wait for them
    mpirun -np 2 python benchmarks/mpi_backend/waiting.py    # a message to and fro

Prints medians over rounds in which the ways to wait take turns.
"""

import statistics
import time

import torch
import torch.distributed as dist
from mpi4py import MPI

import pipeline

ROUNDS = 15
COMPUTE_S = 0.2
TRIPS = 200


def main() -> None:
    world = pipeline.init()
    if world.size == 2:
        figures, unit = measure({"ours": trip_ours, "mpi4py": trip_mpi4py}), "µs per message"
    else:
        ways = {"nobody waits": time.sleep, "ours": wait_ours, "mpi4py": wait_mpi4py}
        figures = measure({name: lambda wait=wait: products(wait) for name, wait in ways.items()})
        unit = "products per second and computing rank"
    if world.rank == 0:
        for name, value in figures.items():
            print(f"{name}: {value:.1f} {unit}")


def measure(ways: dict) -> dict[str, float]:
    """The median of rank 0's figures for each way."""
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            dist.barrier()
            samples[name].append(way())
    return {name: statistics.median(values) for name, values in samples.items()}


def products(wait) -> float:
    """The first half of the ranks multiplies matrices, the second half waits for its partner to have done so."""
    rank, half = dist.get_rank(), dist.get_world_size() // 2
    if rank >= half:
        wait(COMPUTE_S * 1.5 if wait is time.sleep else rank - half)
        return 0.0
    a = torch.ones(128, 128)
    done, began = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - began) < COMPUTE_S:
        a @ a
        done += 1
    if wait is wait_ours:
        dist.send(torch.ones(1), rank + half)
    elif wait is wait_mpi4py:
        MPI.COMM_WORLD.Send(bytearray(4), rank + half)
    return done / elapsed


def wait_ours(partner: int) -> None:
    dist.recv(torch.ones(1), partner)


def wait_mpi4py(partner: int) -> None:
    MPI.COMM_WORLD.Recv(bytearray(4), partner)


def trip_ours() -> float:
    number, other = torch.ones(2), 1 - dist.get_rank()
    return trips(lambda: dist.send(number, other), lambda: dist.recv(number, other))


def trip_mpi4py() -> float:
    number, other = bytearray(8), 1 - dist.get_rank()
    return trips(lambda: MPI.COMM_WORLD.Send(number, other), lambda: MPI.COMM_WORLD.Recv(number, other))


def trips(send, receive) -> float:
    """Microseconds for a message one way."""
    first, second = (send, receive) if dist.get_rank() == 0 else (receive, send)
    began = time.perf_counter()
    for _ in range(TRIPS):
        first()
        second()
    return (time.perf_counter() - began) / TRIPS / 2 * 1e6


if __name__ == "__main__":
    main()
