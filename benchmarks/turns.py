"""Contenders in separate mpirun jobs that take turns, so that a temporary slowdown of the machine affects all."""

import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist


class Job:
    """An mpirun job whose ranks run `serve`. It ends with its `with` block; `names` lists its contenders."""

    def __init__(self, ranks: int, module: str, *arguments: object, python: str = sys.executable) -> None:
        command = ["mpirun", "-np", str(ranks), python, "-m", module, *map(str, arguments)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.names = self._answer("contenders:")

    def time(self, name: str) -> float:
        """Return the seconds of one call of a contender on the slowest rank."""
        assert self._process.stdin
        print(name, file=self._process.stdin, flush=True)
        return float(self._answer("seconds:")[0])

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(60)

    def _answer(self, prefix: str) -> list[str]:
        assert self._process.stdout
        for line in self._process.stdout:
            if line.startswith(prefix):
                return line.rstrip("\n").split("\t")[1:]
        raise SystemExit(f"a job ended with status {self._process.wait()}")


def serve(runs: Mapping[str, Callable[[], Any]], rank: int) -> None:
    """Run the contenders that the driver requests, until it closes the pipe (collective)."""
    if rank == 0:
        print("contenders:", *runs, sep="\t", flush=True)
    while True:
        request = [sys.stdin.readline().strip() if rank == 0 else ""]
        dist.broadcast_object_list(request)
        if not request[0]:
            return
        dist.barrier()
        started = time.perf_counter()
        runs[request[0]]()
        seconds = torch.tensor(time.perf_counter() - started, dtype=torch.float64)
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        if rank == 0:
            print(f"seconds:\t{float(seconds)}", flush=True)
