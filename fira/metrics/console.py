"""Console output of a training run, as plain lines, because stdout is not a terminal under mpirun."""

from __future__ import annotations

import shlex
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fira.cli import command_words
from fira.metrics.csv_log import Row

SECONDS_BETWEEN_LINES = 2.0
SPECIAL = frozenset('"$`\\!')  # characters with a meaning between double quotes of a shell
RECENT_STEPS = 50


def loss_change(
    before: float | None, after: float, corpus: Mapping[str, Any], cross_entropy: float | None = None
) -> str:
    """Validation loss before and after training, next to the losses of n-gram models in the summary of the corpus.

    before: None if it is not known, as in a resumed run. cross_entropy: that after training, where it is not the loss.
    """
    baselines = [f"{name} {corpus[name]:.3f}" for name in ("unigram", "trigram") if corpus.get(name) is not None]
    change = "" if before is None else f"{before:.3f} → "
    also = "" if cross_entropy is None else f", cross-entropy {cross_entropy:.3f}"
    return f"validation loss {change}{after:.3f}{also}" + (
        f" ({' and '.join(baselines)} on the same tokens)" if baselines else ""
    )


def next_command(run: Path, has_tokenizer: bool, chats: bool, prompt: str = "") -> str:
    """The command that uses the trained model: a chat, if it was trained on `chats`, or the continuation of a text.

    A corpus of token ids comes without a tokenizer. prompt: the text to continue; empty: a new one begins.
    """
    if chats:
        return f"next: {' '.join(command_words('chat'))} --checkpoint {shlex.quote(str(run))}"
    tokenizer = "" if has_tokenizer else " --tokenizer TOKENIZER.json"
    given = f' --prompt "{prompt}"' if prompt else ""
    return f"next: {' '.join(command_words('generate'))} --checkpoint {shlex.quote(str(run))}{tokenizer}{given}"


def beginning(text: str, words: int = 3) -> str:
    """The first words of a text and a space, up to a word that a shell would change between double quotes."""
    first = takewhile(lambda word: word.isprintable() and SPECIAL.isdisjoint(word), text.split()[:words])
    return "".join(f"{word} " for word in first)


class ConsoleProgress:
    """Prints a line for the first step, the last step, every validation, and otherwise at most every two seconds.

    Args:
        first_step: number of the first step of this run, 1 or the one after a checkpoint.
        tokens_per_step: size of the global batch in tokens.
        clock: returns the time in seconds.
    """

    def __init__(
        self, total_steps: int, first_step: int, tokens_per_step: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._total, self._first, self._tokens = total_steps, first_step, tokens_per_step
        self._clock = clock
        self._started = self._last_step = self._last_line = clock()
        self._durations: deque[float] = deque(maxlen=RECENT_STEPS)

    def update(self, row: Row) -> None:
        """Report a step; called after every step and after its validation, if it has one."""
        now = self._clock()
        self._durations.append(now - self._last_step)
        self._last_step = now
        milestone = row.iter in (self._first, self._total) or row.val_loss is not None
        if milestone or now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            print(self._line(row), flush=True)

    def _line(self, row: Row) -> str:
        width = len(str(self._total))
        parts = [f"step {row.iter:{width}d}/{self._total}", f"loss {row.train_loss:.3f}"]
        if row.val_loss is not None:
            parts.append(f"val {row.val_loss:.3f}")
        if (accuracy := row.metrics.get("val_reward_accuracy")) is not None:
            parts.append(f"accuracy {accuracy:.1%}")
        # The median, since a step that also validates or saves is slower than the others.
        speed = tqdm.format_sizeof(self._tokens / max(statistics.median(self._durations), 1e-9))
        parts += [f"lr {row.lr:.1e}", f"{speed} tok/s", f"grad {row.grad_norm:.2f}", self._time(row.iter)]
        return " · ".join(parts)

    def _time(self, step: int) -> str:
        if step == self._total:
            return f"took {tqdm.format_interval(round(self._last_step - self._started))}"
        # The mean includes validations, which also take time; the slowest step, often the first, is left out.
        typical = sorted(self._durations)[:-1] or self._durations
        return f"ETA {tqdm.format_interval(round((self._total - step) * statistics.fmean(typical)))}"
