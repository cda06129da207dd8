"""The teacher of a distillation: a model that runs on the layout of the student."""

from collections.abc import Mapping

import numpy as np

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

    def taught(self, rows: Rows, first: int) -> Rows:
        """The sequences with the tokens of the teacher (collective), see `derived_batches.Change`."""
        return rows._replace(stored=self.stored(rows))


def _id_dtype(vocab_size: int) -> type[np.signedinteger]:
    return np.int16 if vocab_size <= 2**15 else np.int32
