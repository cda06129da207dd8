"""Windows of tokens, shuffled for training and in order for validation.

    tokens:    t₀ t₁ t₂ … cut into windows of seq_len inputs; the last target of a window is the first input of the next
    number:    global index of a training sequence, 0, 1, 2, … through all epochs
    epoch:     number // windows, which seeds the permutation of the windows
    position:  number % windows, the place in this permutation

A sequence is a function of its number, so that any rank can read any sequence.
"""

import numpy as np

from fira.data.packed import PackedTokens
from fira.data.rows import Rows
from fira.errors import UserError
from fira.nn.cross_entropy import IGNORE_INDEX


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
    """Training batches: windows of `seq_len` tokens that do not overlap, in a new seeded order in each epoch.

    Raises UserError if there are fewer tokens than one window needs.
    """

    def __init__(self, tokens: PackedTokens, seq_len: int, seed: int) -> None:
        self.consumed = 0
        self.windows = (len(tokens) - 1) // seq_len  # the last target needs one token more
        if self.windows < 1:
            raise UserError(
                f"{len(tokens)} training tokens, sequences of {seq_len}: give more text or a smaller --seq-len"
            )
        self._tokens, self._seq_len = tokens, seq_len
        self._order = EpochOrder(self.windows, seed)

    def batch(self, first: int, count: int) -> Rows:
        """Return sequences first … first + count − 1."""
        starts = [self._order[number] * self._seq_len for number in range(first, first + count)]
        rows = np.stack([self._tokens.read(start, start + self._seq_len + 1) for start in starts])
        return Rows(rows[:, :-1], rows[:, 1:])


class ValidationSequences:
    """Validation sequences in order: all windows, or `limit` of them at equal distances.

    The last window is padded with the target −100 instead of dropped, so that every token counts and a validation text
    shorter than one window has a loss. Rows beyond the end contain only −100, so that ranks can share uneven batches.
    Raises UserError if there is no token to predict.
    """

    def __init__(self, tokens: PackedTokens, seq_len: int, limit: int | None = None) -> None:
        windows = -(-(len(tokens) - 1) // seq_len)
        if windows < 1:
            raise UserError(f"{len(tokens)} validation tokens: none to predict; give more text")
        count = windows if limit is None else min(limit, windows)
        self._starts = np.arange(count) * windows // count * seq_len
        self._tokens, self._seq_len = tokens, seq_len

    def __len__(self) -> int:
        return len(self._starts)

    def batch(self, first: int, count: int) -> Rows:
        """Return sequences first … first + count − 1. Padding has the token 0 and the target −100."""
        inputs = np.zeros((count, self._seq_len), np.int64)
        targets = np.full((count, self._seq_len), IGNORE_INDEX, np.int64)
        for row, start in enumerate(self._starts[first : first + count]):
            ids = self._tokens.read(start, min(start + self._seq_len + 1, len(self._tokens)))
            inputs[row, : len(ids) - 1] = ids[:-1]
            targets[row, : len(ids) - 1] = ids[1:]
        return Rows(inputs, targets)
