"""PyTorch's tests for backends, run by the ranks of one job that tests/integration/mpi_suite/run.py starts.

Usage: mpirun -np 4 python backend_suite.py BACKEND MASK OUT NAME...

BACKEND is the backend under test and MASK its name in the tests: many tests run for "gloo" only, some for "mpi" only.
Each rank appends one JSON line per test to OUT/RANK.jsonl: name, outcome (pass, skip or fail), seconds, reason.
"""

import functools
import json
import os
import signal
import sys
import time
import traceback
import unittest
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

TEST_S = 60  # limit per test; then the job ends and run.py continues with the next test


def main(backend: str, mask: str, out: str, names: list[str]) -> None:
    rank, size = start(backend)
    os.environ |= {"BACKEND": mask, "WORLD_SIZE": str(size), "TEMP_DIR": f"{out}/tmp", "MASTER_ADDR": "localhost"}
    for folder in ("test_dir", "barrier", "init_dir"):
        Path(out, "tmp", folder).mkdir(parents=True, exist_ok=True)
    import torch.distributed as dist
    from torch.autograd.profiler_util import FunctionEvent
    from torch.testing._internal.common_distributed import DistTestCases
    from torch.testing._internal.common_utils import TestCase

    DistTestCases.backend_feature["ddp"].add("mpi")
    DistTestCases.backend_feature["subgroup"].add("mpi")
    DistTestCases.skip_collective["allgather_coalesced"].discard("mpi")
    from torch.testing._internal.distributed import distributed_test

    # The profiler records the operations, but only C++ code can mark an event as asynchronous.
    FunctionEvent.is_async = property(lambda event: True, lambda event, value: None)
    if backend != mask:
        rename_backend(mask, backend)
    if mask == "gloo" != backend:  # under "mpi", the tests find the profiler's events by their names
        distributed_test.PROFILING_SUPPORTED_BACKENDS.remove(mask)
        distributed_test.SEND_RECV_PROFILING_SUPPORTED_BACKENDS.remove(mask)

    class Suite(TestCase, distributed_test.DistributedTest._DistTestBase):
        """The tests, on ranks that have already been started."""

        file_name = f"{out}/tmp/store"
        init_method = f"file://{file_name}"
        skip_return_code_checks = ()

        @property
        def rank(self) -> int:
            return rank

        @property
        def world_size(self) -> str:
            return str(size)

    distributed_test.Barrier.init()
    for name in names:
        began = time.monotonic()
        Suite.file_name = f"{out}/tmp/store-{name}"
        Suite.init_method = f"file://{Suite.file_name}"
        limit = timedelta(seconds=distributed_test.CUSTOM_PG_TIMEOUT.get(name, 60))
        store = dist.FileStore(Suite.file_name, size)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
        outcome, reason = run(Suite, name)
        with Path(out, f"{rank}.jsonl").open("a") as file:
            record = {"name": name, "outcome": outcome, "seconds": time.monotonic() - began, "reason": reason}
            file.write(json.dumps(record) + "\n")
        signal.alarm(TEST_S)  # other ranks may wait for a rank whose test failed
        distributed_test.Barrier.sync()
        dist.destroy_process_group()
        signal.alarm(0)


def start(backend: str) -> tuple[int, int]:
    """Return rank and world size. Register the MPI backend if it is under test."""
    if backend == "cpu:mpi":
        import torch.distributed as dist

        import pipeline

        world = pipeline.init()
        dist.destroy_process_group()  # every test creates its own
        return world.rank, world.size
    from mpi4py import MPI

    return MPI.COMM_WORLD.Get_rank(), MPI.COMM_WORLD.Get_size()


def rename_backend(mask: str, backend: str) -> None:
    """Make ``torch.distributed`` accept and return the name ``mask`` for ``backend``."""
    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    def translated(function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*args: object, **kwargs: object) -> object:
            if kwargs.get("backend") == mask:
                kwargs["backend"] = backend
            return function(*args, **kwargs)

        return call

    dist.init_process_group = translated(dist.init_process_group)
    dist.new_group = translated(dist.new_group)
    get_backend = distributed_c10d.get_backend
    dist.get_backend = distributed_c10d.get_backend = lambda group=None: get_backend(group).replace(backend, mask)


def run(suite: type[unittest.TestCase], name: str) -> tuple[str, str]:
    """Run one test. Return its outcome and reason on this rank."""
    signal.alarm(TEST_S)
    try:
        suite(name).debug()
    except unittest.SkipTest as skip:
        return "skip", str(skip)
    except SystemExit as end:  # the suite skips a running test by its exit status
        return ("skip" if end.code in range(72, 90) else "fail"), f"exit status {end.code}"
    except Exception:
        return "fail", traceback.format_exc()
    finally:
        signal.alarm(0)
    return "pass", ""


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:])
