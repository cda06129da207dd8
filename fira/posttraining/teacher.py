"""The teacher of a distillation: a model that runs on the layout of the student."""

from collections.abc import Mapping

import numpy as np

from fira.data.mixture import CountedBatches
from fira.data.rows import Rows
from fira.parallel.forward_pass import ForwardPass
from fira.posttraining.distillation import IDS, LOGS, TeacherTokens
from fira.posttraining.window_store import Column


class Teacher:
    """Returns the most probable tokens of a model for sequences. tokens: how many, and at which temperature."""

    def __init__(self, forward: ForwardPass, tokens: TeacherTokens, vocab_size: int) -> None:
        self._forward, self._tokens = forward, tokens
        self._id_dtype = np.int16 if vocab_size <= 2**15 else np.int32

    def columns(self, seq_len: int) -> dict[str, Column]:
        """The arrays of `stored`, for a store."""
        k = self._tokens.k
        return {IDS: Column((seq_len, k), self._id_dtype), LOGS: Column((seq_len, k + 1), np.float32)}

    def stored(self, rows: Rows) -> Mapping[str, np.ndarray]:
        """Tokens and log-probabilities for the sequences in `rows`, on every rank (collective)."""
        report = self._forward.reports(_Batch(rows), 0, len(rows.tokens), self._tokens).numpy()
        k = self._tokens.k
        return {IDS: report[..., :k].astype(self._id_dtype), LOGS: report[..., k:].astype(np.float32)}


class TaughtBatches:
    """Batches of which the teacher's tokens are computed when they are read (collective)."""

    def __init__(self, batches: CountedBatches, teacher: Teacher) -> None:
        self._batches, self._teacher = batches, teacher

    def __len__(self) -> int:
        return len(self._batches)

    def batch(self, first: int, count: int) -> Rows:
        """Return sequences first … first + count − 1."""
        rows = self._batches.batch(first, count)
        return rows._replace(stored=self._teacher.stored(rows))


class _Batch:
    """One batch, as an argument of ForwardPass."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows.tokens)

    def batch(self, first: int, count: int) -> Rows:
        return self._rows
