"""Name a rank that is slower than the others, from times that the ranks exchange with the results of each step.

The time of a step on a rank is divided into

    waited    for other ranks, in MPI operations (operations of NCCL are not included)
    own       the rest: computing, reading data, updating weights
    running   the part of `own` in which the main thread ran on a core

Every WINDOW steps, the median own time of each rank is compared with an expected time:

    several replicas   the median of the other ranks of its stage, which do the same work
    one replica        its own time in the first window, times the ratio by which the other ranks have become slower
                       since then, because stages differ in their work

A rank is slow if it needs more than FACTOR times the expected time, and LEAST_S seconds more, while the others wait
LEAST_S seconds longer than it does, in two windows in succession. It is reported once, and again after a window in
which it was not slow.
"""

import logging
import time
from collections.abc import Sequence
from statistics import median

from pipeline.mesh import Layout
from pipeline.mpi import World

WINDOW = 20  # steps; single slow steps do not change the median
FACTOR = 1.5
LEAST_S = 0.01

logger = logging.getLogger(__name__)


class Stragglers:
    """Times of the ranks. `start`, `stop` and `exchanged` are called on all ranks in every step, `update` on one."""

    def __init__(self, world: World, layout: Layout) -> None:
        self._world = world
        self._layout = layout
        self._times = [0.0, 0.0, 0.0]  # own, waited and running time of this rank in the last step
        self._steps: list[list[float]] = []  # of this window: the times of all ranks
        self._usual: list[float] = []  # own time of each rank in the first window
        self._slow: dict[int, int] = {}  # rank → number of windows in succession in which it was slow

    def start(self) -> None:
        """Begin to measure a step."""
        self._started = time.perf_counter(), self._world.waited_s(), time.thread_time()

    def stop(self) -> None:
        """End the measurement of a step."""
        began, waited, running = self._started
        waited = self._world.waited_s() - waited
        self._times = [time.perf_counter() - began - waited, waited, time.thread_time() - running]

    def exchanged(self) -> list[float]:
        """The times of the last step at this rank's place in a list of zeros; the sum over ranks has all times."""
        before = [0.0] * (3 * self._world.rank)
        return before + self._times + [0.0] * (3 * (self._world.size - self._world.rank - 1))

    def update(self, step: int, times: Sequence[float]) -> None:
        """Log the ranks that have become slow. times: the sum of `exchanged` over all ranks, in a step."""
        if self._world.size == 1 or not any(times):  # before the first step
            return
        self._steps.append(list(times))
        if len(self._steps) < WINDOW:
            return
        medians = [median(values) for values in zip(*self._steps, strict=True)]
        self._steps = []
        own, waited = medians[0::3], medians[1::3]
        self._usual = self._usual or own
        expected = [self._expected(rank, own) for rank in range(self._world.size)]
        slow = [
            rank
            for rank, seconds in enumerate(own)
            if seconds > FACTOR * expected[rank]
            and seconds - expected[rank] > LEAST_S
            and median(_without(rank, waited)) - waited[rank] > LEAST_S
        ]
        self._slow = {rank: self._slow.get(rank, 0) + 1 for rank in slow}
        for rank in slow:
            if self._slow[rank] == 2:
                self._report(rank, step, expected[rank], medians)

    def _expected(self, rank: int, own: list[float]) -> float:
        """The expected own time of each rank, as defined at the top of this file."""
        peers = [peer for peer in self._layout.group("dp", rank) if peer != rank]
        if peers:
            return median(own[peer] for peer in peers)
        others = [own[other] / self._usual[other] for other in range(len(own)) if other != rank]
        return self._usual[rank] * median(others)

    def _report(self, rank: int, step: int, expected: float, medians: list[float]) -> None:
        own, waited, running = (1000 * seconds for seconds in medians[3 * rank : 3 * rank + 3])
        others = 1000 * median(_without(rank, medians[1::3]))
        logger.warning(
            f"rank {rank} (stage {rank // self._layout.dp}) is slow: in steps {step - WINDOW + 1} to {step} its own "
            f"work took {own:.0f} ms per step, {1000 * expected:.0f} ms were expected, and its thread ran for "
            f"{running:.0f} ms; it waited {waited:.0f} ms per step for other ranks, which waited {others:.0f} ms"
        )


def _without(rank: int, values: list[float]) -> list[float]:
    """The values of the other ranks."""
    return values[:rank] + values[rank + 1 :]
