"""ConsoleProgress on the console, as plain lines: under mpirun the standard output is never a terminal."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable

from fira.metrics.csv_log import Row

QUIET_SECONDS = 2.0
RECENT_STEPS = 50


class ConsoleProgress:
    """Prints the first step, the last, every validation, and else at most one line every two seconds.

    `first_step` is the number of the first step done here (1, or the one after a checkpoint); `tokens_per_step` is the
    global batch in tokens; `clock` gives seconds. One rank prints.
    """

    def __init__(
        self, total_steps: int, first_step: int, tokens_per_step: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._total, self._first, self._tokens = total_steps, first_step, tokens_per_step
        self._clock = clock
        self._started = self._last_step = self._last_line = clock()
        self._durations: deque[float] = deque(maxlen=RECENT_STEPS)

    def update(self, row: Row) -> None:
        """Call after every step, once its validation, if any, is done."""
        now = self._clock()
        self._durations.append(now - self._last_step)
        self._last_step = now
        milestone = row.iter in (self._first, self._total) or row.val_loss is not None
        if milestone or now - self._last_line >= QUIET_SECONDS:
            self._last_line = now
            print(self._line(row), flush=True)

    def _line(self, row: Row) -> str:
        width = len(str(self._total))
        parts = [f"step {row.iter:{width}d}/{self._total}", f"loss {row.train_loss:.3f}"]
        if row.val_loss is not None:
            parts.append(f"val {row.val_loss:.3f}")
        # A step that also validates or saves is slow: the median leaves it out of the speed.
        speed = self._tokens / max(statistics.median(self._durations), 1e-9)
        parts += [f"lr {row.lr:.1e}", f"{_short(speed)} tok/s", f"grad {row.grad_norm:.2f}", self._time(row.iter)]
        return " · ".join(parts)

    def _time(self, step: int) -> str:
        if step == self._total:
            return f"took {_minutes(self._last_step - self._started)}"
        # Validations to come take time too, so a mean; without its slowest step, often the first or a hiccup.
        usual = sorted(self._durations)[:-1] or self._durations
        return f"ETA {_minutes((self._total - step) * statistics.fmean(usual))}"


def _short(number: float) -> str:
    """950, 12.3k, 4.56M."""
    if number < 1e3:
        return f"{number:.0f}"
    return f"{number / 1e3:.1f}k" if number < 1e6 else f"{number / 1e6:.2f}M"


def _minutes(seconds: float) -> str:
    """1:23, or 2:01:23 from an hour on."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
