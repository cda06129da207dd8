"""Sequences of packed documents, for the trainings of `parity_ranks`."""

import numpy as np

from fira.data.loader import Loader, ValidationSequences
from fira.data.rows import Rows, concatenate
from fira.nn.cross_entropy import IGNORE_INDEX


class PackedSequences:
    """Each sequence is a function of its number: random documents, of which about half of the targets are trained.

    It has the interface of Loader and of ValidationSequences, of which there are five.
    """

    def __init__(self, vocab_size: int, seq_len: int) -> None:
        self.consumed = 0
        self.shape = vocab_size, seq_len

    def __len__(self) -> int:
        return 5

    def documents(self, number: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Tokens and targets of the documents of a sequence: in turn one, some, and some with padding after them."""
        vocab_size, seq_len = self.shape
        rng = np.random.default_rng([7, number])
        count = 1 + number % 3
        ends = np.sort(rng.choice(np.arange(1, seq_len), count - 1, replace=False))
        lengths = np.diff([0, *ends, seq_len - (count == 3)])
        tokens = [rng.integers(vocab_size, size=length) for length in lengths if length]
        return [(row, np.where(rng.random(len(row)) < 0.5, (3 * row + 1) % vocab_size, IGNORE_INDEX)) for row in tokens]

    def batch(self, first: int, count: int) -> Rows:
        return self.rows([self.documents(number) for number in range(first, first + count)])

    def rows(self, sequences: list[list[tuple[np.ndarray, np.ndarray]]]) -> Rows:
        """Pack the documents of each sequence."""
        tokens, targets, numbers = (np.full((len(sequences), self.shape[1]), fill) for fill in (0, IGNORE_INDEX, -1))
        for row, sequence in enumerate(sequences):
            start = 0
            for number, (inputs, following) in enumerate(sequence):
                span = slice(start, start + len(inputs))
                tokens[row, span], targets[row, span], numbers[row, span] = inputs, following, number
                start = span.stop
        return Rows(tokens, targets, numbers)


class SingleDocuments(PackedSequences):
    """The documents of the same sequences, each in a sequence of its own."""

    def __len__(self) -> int:
        return sum(len(self.documents(number)) for number in range(super().__len__()))

    def batch(self, first: int, count: int) -> Rows:
        documents = [document for number in range(count) for document in self.documents(number)]
        return self.rows([[document] for document in documents[first : first + count]])


class SeparateDocuments:
    """The documents of the first sequences of a loader, each in a sequence of its own, in their order."""

    def __init__(self, loader: Loader | ValidationSequences, sequences: int) -> None:
        self.consumed = 0
        rows = loader.batch(0, sequences)
        assert rows.documents is not None
        parts = []
        for tokens, targets, documents in zip(rows.tokens, rows.targets, rows.documents, strict=True):
            for number in range(documents.max() + 1):
                span = np.flatnonzero(documents == number)
                padding = len(tokens) - len(span)
                inputs = np.pad(tokens[span], (0, padding))
                following = np.pad(targets[span], (0, padding), constant_values=IGNORE_INDEX)
                parts.append(Rows(inputs[None], following[None]))
        self._rows = concatenate(parts)

    def __len__(self) -> int:
        return len(self._rows.tokens)

    def batch(self, first: int, count: int) -> Rows:
        """Return sequences first … first + count − 1, of which those beyond the end are padding."""
        tokens, targets = (array[first : first + count] for array in self._rows[:2])
        missing = ((0, count - len(tokens)), (0, 0))
        return Rows(np.pad(tokens, missing), np.pad(targets, missing, constant_values=IGNORE_INDEX))
