"""The cores on which threads may run. A launcher may bind each rank to some of those that its job has on a machine."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress


def own_cores() -> set[int]:
    """Return the numbers of the cores on which this thread may run; nothing on systems without binding."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()


@contextmanager
def running_on(cores: set[int]) -> Iterator[None]:
    """Context manager in which this thread and those that it starts may run on these cores, where this is possible."""
    before = own_cores()
    with suppress(OSError):
        if before:
            os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        if before:
            os.sched_setaffinity(0, before)
