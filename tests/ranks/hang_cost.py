"""Benchmark of the trace: time per operation, `python tests/ranks/hang_cost.py`.

Measure an all_reduce on one rank alternately with the trace and with a stub. The result is the minimum over many short
runs, because other load on the machine can only increase the time.
"""

import time

import torch
import torch.distributed as dist

import pipeline
from pipeline.mpi.trace import GroupTrace

ROUNDS, CALLS = 1500, 30


class StubEntry:
    operation = "all_reduce"

    def end(self, error: BaseException | None) -> None:
        """Record nothing."""


def microseconds(tensor: torch.Tensor) -> float:
    start = time.perf_counter()
    for _ in range(CALLS):
        dist.all_reduce(tensor)
    return (time.perf_counter() - start) / CALLS * 1e6


if __name__ == "__main__":
    pipeline.init()
    stub, tensor = StubEntry(), torch.zeros(1)
    begins = {"with the trace": GroupTrace.begin, "without": lambda *arguments: stub}
    best = dict.fromkeys(begins, float("inf"))
    for _ in range(ROUNDS):
        for name, begin in begins.items():
            GroupTrace.begin = begin
            best[name] = min(best[name], microseconds(tensor))
    GroupTrace.begin = begins["with the trace"]
    traced, bare = best.values()
    print(f"all_reduce on one rank: {traced:.2f} µs with the trace, {bare:.2f} µs without: {traced - bare:.2f} µs")
