"""Batches whose sequences are changed when they are read, such as by answers that the current model generates."""

from collections.abc import Callable

from fira.data.loader import TrainingBatches
from fira.data.mixture import CountedBatches
from fira.data.rows import Rows

Change = Callable[[Rows, int], Rows]  # (sequences, number of the first one) → as many sequences


class DerivedBatches:
    """Training batches, changed. repeats: how many successive sequences are made from each of `batches`."""

    def __init__(self, batches: TrainingBatches, change: Change, repeats: int = 1) -> None:
        self.consumed = 0
        self._batches, self._change, self._repeats = batches, change, repeats

    def batch(self, first: int, count: int) -> Rows:
        """Return sequences first … first + count − 1; both are multiples of `repeats`."""
        rows = self._batches.batch(first // self._repeats, count // self._repeats)
        return self._change(rows.repeated(self._repeats), first)


class DerivedSequences:
    """Validation sequences, changed."""

    def __init__(self, batches: CountedBatches, change: Change) -> None:
        self._batches, self._change = batches, change

    def __len__(self) -> int:
        return len(self._batches)

    def batch(self, first: int, count: int) -> Rows:
        """Return sequences first … first + count − 1."""
        return self._change(self._batches.batch(first, count), first)
