"""What tracing costs per operation: `python tests/ranks/hang_cost.py`.

An all_reduce on one rank, with the trace and with a stand-in that does nothing, taking turns; the best of many short
runs of each, since what else the machine does can only add to it.
"""

import time

import torch
import torch.distributed as dist

import pipeline
from pipeline.mpi.trace import GroupTrace

ROUNDS, CALLS = 1500, 30


class Nothing:
    operation = "all_reduce"

    def end(self, error: BaseException | None) -> None:
        """Note nothing."""


def microseconds(tensor: torch.Tensor) -> float:
    start = time.perf_counter()
    for _ in range(CALLS):
        dist.all_reduce(tensor)
    return (time.perf_counter() - start) / CALLS * 1e6


if __name__ == "__main__":
    pipeline.init()
    nothing, tensor = Nothing(), torch.zeros(1)
    begins = {"with the trace": GroupTrace.begin, "without": lambda *arguments: nothing}
    best = dict.fromkeys(begins, float("inf"))
    for _ in range(ROUNDS):
        for name, begin in begins.items():
            GroupTrace.begin = begin
            best[name] = min(best[name], microseconds(tensor))
    traced, bare = best.values()
    print(f"all_reduce on one rank: {traced:.2f} µs with the trace, {bare:.2f} µs without: {traced - bare:.2f} µs")
