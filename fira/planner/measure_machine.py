"""Measure the memory bandwidth of this machine and the links between its ranks. All ranks measure simultaneously."""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist

from fira.planner.device_specs import OPERATIONS, Link
from pipeline.mesh import Layout, make_mesh
from pipeline.mpi import World

# The link assumed between processes of one machine when only one process measures.
SHARED_MEMORY = Link(latency=5e-5, bandwidth=2e9)
MESSAGE_SIZES = (2**10, 2**22)  # bytes


def measure_machine(device: torch.device, world: World) -> dict[str, Any]:
    """Memory bandwidth, and the links between all ranks of the world (collective)."""
    a, b = torch.empty(2, 2**24, device=device)
    seconds = median_seconds(lambda: a.copy_(b), device)
    links = {name: asdict(SHARED_MEMORY) for name in OPERATIONS}
    if world.size > 1:
        group = make_mesh(Layout(1, world.size, 1), [0], [device]).groups["dp"]
        hops = {"p2p": 2, "all_to_all": 1, "all_reduce": 2 * math.ceil(math.log2(world.size))}
        shares = {"p2p": 2.0, "all_to_all": 1 - 1 / world.size, "all_reduce": 2 - 2 / world.size}
        for name in OPERATIONS:
            small, large = (
                median_seconds(_operation(name, size, device, world, group), device) for size in MESSAGE_SIZES
            )
            bandwidth = shares[name] * (MESSAGE_SIZES[1] - MESSAGE_SIZES[0]) / max(large - small, 1e-9)
            links[name] = asdict(Link(small / hops[name], bandwidth))
    return {"memory_bandwidth": 2 * a.nbytes / seconds, "links": links}


def _operation(name: str, size: int, device: torch.device, world: World, group: dist.ProcessGroup) -> Callable[[], Any]:
    """A message of `size` bytes from rank 0 to rank 1 and back, or a collective operation of all ranks."""
    x, y = torch.zeros(2, size // 4 // world.size * world.size, device=device)
    if name == "all_reduce":
        return lambda: dist.all_reduce(x, group=group)
    if name == "all_to_all":
        return lambda: dist.all_to_all_single(y, x, group=group)

    def round_trip() -> None:
        if world.rank == 0:
            dist.send(x, 1, group=group)
            dist.recv(x, 1, group=group)
        elif world.rank == 1:
            dist.recv(x, 0, group=group)
            dist.send(x, 0, group=group)

    return round_trip


def median_seconds(work: Callable[[], Any], device: torch.device, repeats: int = 20) -> float:
    """Median seconds of one call."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
