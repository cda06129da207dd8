"""Signals to the supervisor.

SIGINT ends the run at once, SIGTERM and SIGHUP end it after a checkpoint. SIGUSR1 requests a checkpoint.
"""

import signal
import time
from types import FrameType

POLL_S = 0.05


class StopRequest:
    """Handlers of this process.

    number: the signal that asked to end the run, or None; SIGINT has priority. checkpoint: whether SIGUSR1 was
    received and has not been passed on to a job.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.checkpoint = False
        signals = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as with nohup
            signals.append(signal.SIGHUP)
        for number in signals:
            signal.signal(number, self._record)
        signal.signal(signal.SIGUSR1, self._record_checkpoint)

    def _record(self, number: int, frame: FrameType | None) -> None:
        if self.number != signal.SIGINT:
            self.number = number

    def _record_checkpoint(self, number: int, frame: FrameType | None) -> None:
        self.checkpoint = True

    @property
    def immediate(self) -> bool:
        """Whether the run is to end without a checkpoint."""
        return self.number == signal.SIGINT

    def wait(self, seconds: float) -> None:
        """Wait some seconds, or until a signal is received."""
        deadline = time.monotonic() + seconds
        while self.number is None and time.monotonic() < deadline:
            time.sleep(POLL_S)
