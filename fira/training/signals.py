"""SIGUSR1: save a checkpoint and continue. SIGTERM: save a checkpoint and end the run.

A handler only records the signal. All ranks act on it after the same step, since the requests of all ranks are summed
together with the results of that step.
"""

import signal
from types import FrameType


class Signals:
    """Handlers of this process for SIGUSR1 and SIGTERM."""

    def __init__(self) -> None:
        self._save = self._end = False
        signal.signal(signal.SIGUSR1, self._record)
        signal.signal(signal.SIGTERM, self._record)

    def _record(self, number: int, frame: FrameType | None) -> None:
        self._save = True
        self._end = self._end or number == signal.SIGTERM

    def repeat(self, requests: list[float]) -> None:
        """Record requests again, because the step in which they were taken was abandoned."""
        self._save, self._end = self._save or requests[0] > 0, self._end or requests[1] > 0

    def take_requests(self) -> list[float]:
        """The requests since the last call, [save, end], as 0 or 1."""
        requests = [float(self._save), float(self._end)]
        self._save = self._end = False
        return requests
