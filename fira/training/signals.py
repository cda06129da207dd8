"""SIGUSR1: save a checkpoint and continue. SIGTERM: save a checkpoint and end the run.

A handler only counts the signals. All ranks act on them after the same step, since the requests of all ranks are summed
together with the results of that step. This module imports nothing that takes time, so that SIGUSR1 is handled from the
start of the program; its default action would end the process.
"""

import signal
from types import FrameType


class Signals:
    """Handler of this process for SIGUSR1 and, after `catch_termination`, SIGTERM.

    Before, SIGTERM ends the process at once: there is nothing to save.
    """

    def __init__(self) -> None:
        self._received = {signal.SIGUSR1: 0, signal.SIGTERM: 0}  # written by the handler only
        self._taken = dict(self._received)
        signal.signal(signal.SIGUSR1, self._count)

    def catch_termination(self) -> None:
        signal.signal(signal.SIGTERM, self._count)

    def _count(self, number: int, frame: FrameType | None) -> None:
        self._received[signal.Signals(number)] += 1

    def repeat(self, requests: list[float]) -> None:
        """Record requests again, because the step in which they were taken was abandoned."""
        for number, request in zip(self._received, requests, strict=True):
            if request:
                self._taken[number] = -1

    def take_requests(self) -> list[float]:
        """The requests since the last call, [save, end], as 0 or 1. A signal during the call counts for the next."""
        received = dict(self._received)
        new = {number: received[number] > self._taken[number] for number in received}
        self._taken = received
        return [float(any(new.values())), float(new[signal.SIGTERM])]
