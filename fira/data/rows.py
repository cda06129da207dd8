"""Rows of tokens, as a loader returns them: one sequence per row, which may contain several documents."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fira.nn.cross_entropy import IGNORE_INDEX


class Rows(NamedTuple):
    """Sequences of T tokens; all arrays are int64 [count, T].

    tokens: the inputs. Padding, on the right, has the token 0.
    targets: the next token at each position, −100 where it is not trained.
    documents: the number of each token's document in its sequence: ascending from 0, −1 in padding. A document is
    trained as if it were a sequence of its own. None: each sequence is one document, which ends with its last trained
    target.
    """

    tokens: np.ndarray
    targets: np.ndarray
    documents: np.ndarray | None = None

    def lengths(self) -> np.ndarray:
        """[count] int64, the number of tokens of each sequence before its padding."""
        if self.documents is not None:
            return (self.documents >= 0).sum(1)
        trained = self.targets != IGNORE_INDEX
        return np.where(trained.any(1), trained.shape[1] - trained[:, ::-1].argmax(1), 0)


def concatenate(parts: Sequence[Rows]) -> Rows:
    """The sequences of all parts, in order."""
    documents = None
    if any(part.documents is not None for part in parts):
        documents = np.concatenate([_documents(part) for part in parts])
    return Rows(np.concatenate([p.tokens for p in parts]), np.concatenate([p.targets for p in parts]), documents)


def _documents(rows: Rows) -> np.ndarray:
    """`rows.documents`, also where each sequence is one document."""
    if rows.documents is not None:
        return rows.documents
    return np.where(np.arange(rows.tokens.shape[1]) < rows.lengths()[:, None], 0, -1)
