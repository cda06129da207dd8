"""SIGTERM: save, then end. SIGUSR1: save and go on. A handler only notes it; ranks agree at the next step."""

import signal
from types import FrameType


class Signals:
    """`wanted()` gives and clears what has arrived on this rank since the last call: [save, end]."""

    def __init__(self) -> None:
        self._save = self._end = False
        signal.signal(signal.SIGUSR1, self._note)
        signal.signal(signal.SIGTERM, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._save = True
        self._end = self._end or number == signal.SIGTERM

    def wanted(self) -> list[bool]:
        wanted = [self._save, self._end]
        self._save = self._end = False
        return wanted
