"""Random tokens instead of a text, for trial steps and checks."""

import numpy as np

from fira.data.loader import Loader
from fira.data.rows import Rows


class RandomTokens(Loader):
    """A loader of random sequences instead of the windows of a text."""

    def __init__(self, vocab_size: int, seq_len: int) -> None:
        self.consumed = 0
        self.shape = vocab_size, seq_len

    def batch(self, first: int, count: int) -> Rows:
        """Return sequences first … first + count − 1."""
        vocab_size, seq_len = self.shape
        numbers = range(first, first + count)
        rows = np.stack([np.random.default_rng(n).integers(vocab_size, size=seq_len + 1) for n in numbers])
        return Rows(rows[:, :-1], rows[:, 1:])
