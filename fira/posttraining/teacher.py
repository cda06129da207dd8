"""The teacher of a distillation: a model that runs on the layout of the student."""

from collections.abc import Mapping

import numpy as np

from fira.data.loader import TrainingBatches
from fira.data.mixture import CountedBatches
from fira.data.rows import Rows
from fira.parallel.forward_pass import ForwardPass
from fira.posttraining.distillation import IDS, LOGS, TeacherTokens
from fira.posttraining.window_store import Column


def columns(k: int, seq_len: int, vocab_size: int) -> dict[str, Column]:
    """The arrays of `Teacher.stored`, for a store."""
    return {IDS: Column((seq_len, k), _id_dtype(vocab_size)), LOGS: Column((seq_len, k + 1), np.float32)}


class Teacher:
    """Returns the most probable tokens of a model for sequences. tokens: how many, and at which temperature."""

    def __init__(self, forward: ForwardPass, tokens: TeacherTokens, vocab_size: int) -> None:
        self._forward, self._tokens, self._id_dtype = forward, tokens, _id_dtype(vocab_size)

    def stored(self, rows: Rows) -> Mapping[str, np.ndarray]:
        """Tokens and log-probabilities for the sequences in `rows`, on every rank (collective)."""
        report = self._forward.reports(lambda *_: rows, 0, len(rows.tokens), self._tokens).numpy()
        k = self._tokens.k
        return {IDS: report[..., :k].astype(self._id_dtype), LOGS: report[..., k:].astype(np.float32)}


def _id_dtype(vocab_size: int) -> type[np.signedinteger]:
    return np.int16 if vocab_size <= 2**15 else np.int32


class TaughtLoader:
    """Training batches of which the teacher's tokens are computed when they are read (collective)."""

    def __init__(self, batches: TrainingBatches, teacher: Teacher) -> None:
        self.consumed = 0
        self._batches, self._teacher = batches, teacher

    def batch(self, first: int, count: int) -> Rows:
        """Return sequences first … first + count − 1."""
        rows = self._batches.batch(first, count)
        return rows._replace(stored=self._teacher.stored(rows))


class TaughtValidation:
    """The same for validation sequences."""

    def __init__(self, batches: CountedBatches, teacher: Teacher) -> None:
        self._batches, self._teacher = batches, teacher

    def __len__(self) -> int:
        return len(self._batches)

    def batch(self, first: int, count: int) -> Rows:
        """Return sequences first … first + count − 1."""
        rows = self._batches.batch(first, count)
        return rows._replace(stored=self._teacher.stored(rows))
