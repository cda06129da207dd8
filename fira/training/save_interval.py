"""The value of --save-every: checkpoints after a number of steps, or after a time."""

import re
import time
from collections.abc import Callable

from fira.errors import UserError

SECONDS = {"s": 1, "m": 60, "h": 3600}


class SaveInterval:
    """An interval such as `100` (steps), `600s`, `10m` or `2h`. Raises UserError for another `text`.

    clock: returns the time in seconds. The clocks of ranks differ, so that one rank must decide for all.
    """

    def __init__(self, text: str, clock: Callable[[], float] = time.monotonic) -> None:
        match = re.fullmatch(r"([0-9]{1,9})|([0-9]{0,9}\.?[0-9]{1,9})([smh])", text)
        self.steps = int(match[1]) if match and match[1] else None
        self.seconds = float(match[2]) * SECONDS[match[3]] if match and match[2] else None
        if not (self.steps or self.seconds):
            raise UserError(f"--save-every {text}: give a number of steps above 0, or a time such as 600s, 10m or 2h")
        self._clock = clock
        self.restart()

    def is_step(self, step: int) -> bool:
        """Return whether a checkpoint is saved after this step; False if the interval is a time."""
        return self.steps is not None and step % self.steps == 0

    def has_elapsed(self) -> bool:
        """Return whether the time since `restart` exceeds the interval; False if it is a number of steps."""
        return self.seconds is not None and self._clock() - self._started >= self.seconds

    def restart(self) -> None:
        """Start the interval now."""
        self._started = self._clock()
