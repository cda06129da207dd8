"""Windows of a text.

tokens: t₀ t₁ t₂ … cut into windows of seq_len inputs; the last target of a window is the first input of the next one.

    window      b b E c c c E d     E: the separator, EOS of the tokenizer
    documents   0 0 1 1 1 1 2 2     of the inputs
    targets     b E c c c E d d     none is ignored: a separator is the last target of a document, and begins the next
"""

from collections.abc import Sequence

import numpy as np

from fira.data.packed import PackedTokens
from fira.data.rows import Rows
from fira.errors import UserError
from fira.nn.cross_entropy import IGNORE_INDEX


class TextWindows:
    """Windows of `seq_len` tokens that do not overlap.

    complete: leave out the last window if it is shorter, as in training. Otherwise it is padded with the target −100,
    so that every token counts, and a validation text that is shorter than one window has a loss.
    separator: the token that begins each document; documents are kept apart. None: a window is one document.
    Raises UserError if there is no window.
    """

    def __init__(self, tokens: PackedTokens, seq_len: int, complete: bool = True, separator: int | None = None) -> None:
        targets = len(tokens) - 1  # the first token is not predicted
        self._count = targets // seq_len if complete else -(-targets // seq_len)
        if self._count < 1 and complete:
            raise UserError(
                f"{len(tokens)} training tokens, sequences of {seq_len}: give more text or a smaller --seq-len"
            )
        if self._count < 1:
            raise UserError(f"{len(tokens)} validation tokens: none to predict; give more text")
        self._tokens, self._seq_len, self._separator = tokens, seq_len, separator

    def __len__(self) -> int:
        return self._count

    def rows(self, numbers: Sequence[int], count: int) -> Rows:
        """Return the windows of these numbers, followed by padding up to `count` rows."""
        inputs = np.zeros((count, self._seq_len), np.int64)
        targets = np.full_like(inputs, IGNORE_INDEX)
        for row, number in enumerate(numbers):
            start = number * self._seq_len
            ids = self._tokens.read(start, min(start + self._seq_len + 1, len(self._tokens)))
            inputs[row, : len(ids) - 1] = ids[:-1]
            targets[row, : len(ids) - 1] = ids[1:]
        rows = Rows(inputs, targets)
        if self._separator is None:
            return rows
        tokens = np.arange(self._seq_len) < rows.lengths()[:, None]
        return rows._replace(documents=np.where(tokens, document_numbers(inputs, self._separator), -1))


def document_numbers(tokens: np.ndarray, separator: int) -> np.ndarray:
    """Return the number of each token's document in its row, int64 [B, T], ascending from 0. tokens: [B, T]."""
    begins = tokens == separator
    return begins.cumsum(1) - begins[:, :1]
