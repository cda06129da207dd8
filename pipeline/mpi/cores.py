"""The cores on which threads may run. A launcher may bind each rank to some of those that its job has on a machine."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

BINDS = hasattr(os, "sched_setaffinity")  # not on macOS


def own_cores() -> set[int]:
    """Return the numbers of the cores on which this thread may run; all cores on systems without binding."""
    return os.sched_getaffinity(0) if BINDS else set(range(os.cpu_count() or 1))


@contextmanager
def running_on(cores: set[int]) -> Iterator[None]:
    """Context manager in which this thread and those that it starts may run on these cores, where this is possible."""
    before = own_cores()
    with suppress(OSError):
        if BINDS:
            os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        if BINDS:
            os.sched_setaffinity(0, before)
