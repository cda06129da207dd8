"""Packed pairs with the log-probabilities of the reference, the arguments of `PreferenceLoss`."""

from collections.abc import Sequence

import numpy as np

from fira.data.rows import Rows
from fira.posttraining.packed_examples import PackedExamples


class PreferencePairs:
    """Sequences of packed pairs, with the interface of PackedExamples.

    reference: float64 [documents], the log-probability of the answer in each document, see `fira.training.reference`.
    """

    def __init__(self, examples: PackedExamples, reference: np.ndarray) -> None:
        if len(reference) != examples.documents:
            raise ValueError(f"{len(reference)} log-probabilities for {examples.documents} documents")
        self._examples, self._reference = examples, reference

    def __len__(self) -> int:
        return len(self._examples)

    def rows(self, numbers: Sequence[int], count: int) -> Rows:
        """Return the sequences of these numbers, followed by padding up to `count` rows."""
        rows = self._examples.rows(numbers, count)
        assert rows.documents is not None
        most = max(1, self._examples.seq_len // 4)  # a document has at least two tokens, the second of its answer
        reference = np.zeros((count, 2 * most))
        for row, number in enumerate(numbers):
            own = self._reference[self._examples.documents_of(number)]
            reference[row, : len(own)] = own
        stored = {"documents": rows.documents, "reference": reference.reshape(count, most, 2)}
        return rows._replace(stored=stored)
