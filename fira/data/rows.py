"""Rows of tokens, as a loader returns them: one sequence per row, which may contain several documents."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from fira.nn.cross_entropy import IGNORE_INDEX


class Rows(NamedTuple):
    """Sequences of T tokens; tokens, targets and documents are int64 [count, T].

    tokens: the inputs. Padding, on the right, has the token 0.
    targets: the next token at each position, −100 where it is not trained.
    documents: the number of each token's document in its sequence: ascending from 0, −1 in padding. A document is
    trained as if it were a sequence of its own. None: each sequence is one document, which ends with its last trained
    target.
    stored: arguments of the objective (`fira.nn.objective`), by name; arrays with one row per sequence.
    """

    tokens: np.ndarray
    targets: np.ndarray
    documents: np.ndarray | None = None
    stored: Mapping[str, np.ndarray] = MappingProxyType({})

    def lengths(self) -> np.ndarray:
        """[count] int64, the number of tokens of each sequence before its padding."""
        if self.documents is not None:
            return (self.documents >= 0).sum(1)
        trained = self.targets != IGNORE_INDEX
        return np.where(trained.any(1), trained.shape[1] - trained[:, ::-1].argmax(1), 0)

    def repeated(self, times: int) -> "Rows":
        """Each sequence this many times, one after another."""
        stored = {name: array.repeat(times, 0) for name, array in self.stored.items()}
        documents = None if self.documents is None else self.documents.repeat(times, 0)
        return Rows(self.tokens.repeat(times, 0), self.targets.repeat(times, 0), documents, stored)


def concatenate(parts: Sequence[Rows]) -> Rows:
    """The sequences of all parts, in order."""
    documents = None
    if any(part.documents is not None for part in parts):
        documents = np.concatenate([_documents(part) for part in parts])
    stored = {name: np.concatenate([part.stored[name] for part in parts]) for name in parts[0].stored}
    tokens, targets = (np.concatenate([part[field] for part in parts]) for field in (0, 1))
    return Rows(tokens, targets, documents, stored)


def _documents(rows: Rows) -> np.ndarray:
    """`rows.documents`, also where each sequence is one document."""
    if rows.documents is not None:
        return rows.documents
    return np.where(np.arange(rows.tokens.shape[1]) < rows.lengths()[:, None], 0, -1)
