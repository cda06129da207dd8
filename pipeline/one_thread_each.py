"""Independent computations on the CPU threads of a process, each on one thread.

Products of small matrices take longer on two threads than on one, and results may depend on the number of threads.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


class OneThreadEach:
    """A pool with as many threads as torch uses."""

    def __init__(self) -> None:
        self._count = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(self._count, initializer=torch.set_num_threads, initargs=(1,))

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        """The results in the order of the items. Several threads compute all of them before the first is returned."""
        if self._count == 1:
            return map(function, items)
        results = [*self._pool.map(function, items)]
        torch.set_num_threads(self._count)  # the threads of the pool have changed it for threads that begin later
        return iter(results)
