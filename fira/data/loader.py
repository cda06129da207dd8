"""Sequences for training, shuffled, and for validation, in order.

    windows:   sequences with numbers 0, 1, 2, …, such as those of a text (`TextWindows`) or of packed chats
    number:    global index of a training sequence, 0, 1, 2, … through all epochs
    epoch:     number // windows, which seeds the permutation of the windows
    position:  number % windows, the place in this permutation

A sequence is a function of its number, so that any rank can read any sequence.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from fira.data.rows import Rows


class Windows(Protocol):
    """Sequences with numbers from 0."""

    def __len__(self) -> int: ...

    def rows(self, numbers: Sequence[int], count: int) -> Rows:
        """Return the sequences of these numbers, followed by padding up to `count` rows."""


class TrainingBatches(Protocol):
    """Training sequences by number, without an end. consumed: the number of those that training has read."""

    consumed: int

    def batch(self, first: int, count: int) -> Rows: ...


class EpochOrder:
    """The window of each training sequence by its number: a new seeded permutation of all windows in each epoch."""

    def __init__(self, windows: int, seed: int) -> None:
        self._windows, self._seed = windows, seed
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def __getitem__(self, number: int) -> int:
        epoch, position = divmod(number, self._windows)
        if epoch != self._epoch:  # cached, because a permutation costs more than a batch
            self._epoch = epoch
            self._order = np.random.default_rng([self._seed, epoch]).permutation(self._windows)
        return int(self._order[position])


class Loader:
    """Training batches of windows, in a new seeded order in each epoch. consumed: sequences read by the trainer."""

    def __init__(self, windows: Windows, seed: int) -> None:
        self.consumed = 0
        self._windows = windows
        self._order = EpochOrder(len(windows), seed)

    def window(self, number: int) -> int:
        """Return the window of a sequence."""
        return self._order[number]

    def batch(self, first: int, count: int) -> Rows:
        """Return sequences first … first + count − 1."""
        return self._windows.rows([self.window(number) for number in range(first, first + count)], count)


class ValidationSequences:
    """Validation sequences in order: all windows, or `limit` of them at equal distances.

    Rows beyond the end are padding, so that ranks can share uneven batches. numbers: those of the windows.
    """

    def __init__(self, windows: Windows, limit: int | None = None) -> None:
        count = len(windows) if limit is None else min(limit, len(windows))
        self._windows = windows
        self.numbers: list[int] = (np.arange(count) * len(windows) // count).tolist()

    def __len__(self) -> int:
        return len(self.numbers)

    def batch(self, first: int, count: int) -> Rows:
        """Return sequences first … first + count − 1."""
        return self._windows.rows(self.numbers[first : first + count], count)
