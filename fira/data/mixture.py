"""Training sequences from several sources in fixed proportions.

    number  →  period = number // PERIOD, slot = number % PERIOD
    slot    →  source (`interleave`), index of this slot among the source's slots in a period
    sequence of the source = period · (slots of the source in a period) + index of the slot

The source of a sequence, and the sequence of this source, are functions of the number.
"""

from collections.abc import Sequence
from os.path import exists  # False for a name that is too long
from typing import Protocol

import numpy as np

from fira.data.loader import Loader, ValidationSequences
from fira.data.rows import Rows, concatenate
from fira.errors import UserError

PERIOD = 1000  # sequences after which the proportions are exact; 1 / PERIOD is the smallest share


class CountedBatches(Protocol):
    """Sequences by their numbers, such as ValidationSequences. Rows beyond the last one are padding."""

    def __len__(self) -> int: ...

    def batch(self, first: int, count: int) -> Rows: ...


def parse_mixture(data: str | None) -> list[tuple[str | None, float]]:
    """Parse `a.txt=0.7,b.csv=0.3` into pairs of source and share, the shares summing to 1.

    Without weights, or where a file has this name, `data` is one source. Raises UserError for an invalid weight.
    """
    if data is None or "=" not in data or exists(data):
        return [(data, 1.0)]
    sources, weights = [], []
    for item in data.split(","):
        source, _, weight = item.rpartition("=")
        try:
            weights.append(float(weight))
        except ValueError:
            raise UserError(f"--data {item}: give SOURCE=WEIGHT,SOURCE=WEIGHT, as in en.txt=0.7,hi.txt=0.3") from None
        if not source.strip() or not 0 < weights[-1] < float("inf"):
            raise UserError(f"--data {item}: give a source and a weight above 0, as in hi.txt=0.3")
        sources.append(source)
    return [(source, weight / sum(weights)) for source, weight in zip(sources, weights, strict=True)]


def interleave(weights: Sequence[float]) -> np.ndarray:
    """Return the source of each slot, int64 [PERIOD]: in proportion to the weights and evenly spread."""
    exact = np.array(weights) / sum(weights) * PERIOD
    counts = np.maximum(1, np.floor(exact).astype(int))
    for source in np.argsort(counts - exact, kind="stable")[: PERIOD - counts.sum()]:
        counts[source] += 1  # the sources with the largest remainders
    sources = np.repeat(np.arange(len(counts)), counts)
    positions = np.concatenate([(np.arange(count) + 0.5) / count for count in counts])
    return sources[np.argsort(positions, kind="stable")]


class Mixture:
    """Training batches of several loaders in the proportions of `weights`, with the interface of Loader.

    A source that is smaller than its share begins its next epoch earlier than the others.
    """

    def __init__(self, loaders: Sequence[Loader], weights: Sequence[float]) -> None:
        self.consumed = 0
        self.loaders = loaders
        self._source = interleave(weights)
        self._counts = np.bincount(self._source, minlength=len(loaders))
        self._index = np.empty(len(self._source), np.int64)  # number of earlier slots of the source in a period
        for source, count in enumerate(self._counts):
            self._index[self._source == source] = np.arange(count)

    def batch(self, first: int, count: int) -> Rows:
        """Return sequences first … first + count − 1."""
        places = (self.place(number) for number in range(first, first + count))
        return concatenate([self.loaders[source].batch(number, 1) for source, number in places])

    def place(self, number: int) -> tuple[int, int]:
        """Return the source of a sequence, and its number among the sequences of this source."""
        period, slot = divmod(number, len(self._source))
        source = self._source[slot]
        return int(source), int(period * self._counts[source] + self._index[slot])


class Joined:
    """Validation sequences of several sources, concatenated; rows beyond the end as in ValidationSequences."""

    def __init__(self, sources: Sequence[ValidationSequences]) -> None:
        self.sources = sources
        self._rows = [(source, row) for source in sources for row in range(len(source))]

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, first: int, count: int) -> Rows:
        """Return sequences first … first + count − 1."""
        last = self.sources[-1]
        rows = [source.batch(row, 1) for source, row in self._rows[first : first + count]]
        return concatenate(rows + [last.batch(len(last), 1)] * (count - len(rows)))
