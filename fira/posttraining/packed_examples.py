"""Packed examples on disk, and their sequences for training and validation.

An example is a chat, or a pair of chats with the chosen and the rejected answer. Each chat is a document.

ids         t₀ t₁ t₂ … of all documents, the documents of a sequence next to each other, the sequences in order
trained     1 for the tokens of answers, else 0; 0 for the first token of each document, which nothing predicts
documents   first token of each document, and the number of tokens
sequences   first document of each sequence, and the number of documents

tokens      a₀ a₁ a₂ a₃ b₀ b₁ b₂  0        a sequence of two documents, whose answers are a₂ a₃ and b₂
targets      – a₂ a₃  –  – b₂  –  –        –: −100
documents    0  0  0  0  1  1  1 −1
"""

from collections.abc import Iterable, Sequence
from itertools import accumulate, chain
from pathlib import Path

import numpy as np

from fira.data.chat_template import EncodedChat
from fira.data.packed import PackedTokens, TokenSpan
from fira.data.rows import Rows
from fira.nn.cross_entropy import IGNORE_INDEX
from fira.posttraining.packing import pack
from fira.posttraining.prompted_answers import runs

ARRAYS = ("ids", "trained", "documents", "sequences")

Example = tuple[EncodedChat, ...]  # a chat, or the chosen and the rejected chat of a pair


class PackedExamples:
    """Sequences of at most `seq_len` tokens, memory-mapped. split: as given to `write_examples`."""

    def __init__(self, folder: Path, split: str, seq_len: int) -> None:
        arrays = {name: PackedTokens([TokenSpan(folder / f"{split}-{name}.npy")]) for name in ARRAYS}
        self._ids, self._trained = arrays["ids"], arrays["trained"]
        self._documents, self._sequences = arrays["documents"], arrays["sequences"]
        self.seq_len = seq_len
        self.documents = len(self._documents) - 1

    def __len__(self) -> int:
        return len(self._sequences) - 1

    def documents_of(self, number: int) -> slice:
        """Return which documents a sequence contains."""
        return slice(*self._sequences.read(number, number + 2).tolist())

    def rows(self, numbers: Sequence[int], count: int) -> Rows:
        """Return the sequences of these numbers, followed by padding up to `count` rows."""
        tokens = np.zeros((count, self.seq_len), np.int64)
        targets, documents = np.full_like(tokens, IGNORE_INDEX), np.full_like(tokens, -1)
        for row, number in enumerate(numbers):
            span = self.documents_of(number)
            starts = self._documents.read(span.start, span.stop + 1)
            ids, trained = (array.read(starts[0], starts[-1]) for array in (self._ids, self._trained))
            tokens[row, : len(ids)] = ids
            targets[row, : len(ids) - 1] = np.where(trained[1:], ids[1:], IGNORE_INDEX)
            documents[row, : len(ids)] = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
        return Rows(tokens, targets, documents)


def write_examples(
    folder: Path, split: str, examples: Sequence[Example], seq_len: int, answer_tokens: int = 0
) -> dict[str, int | float]:
    """Pack examples of at most `seq_len` tokens, write them for `PackedExamples`, and return their counts.

    All documents of an example are in the same sequence. answer_tokens: each sequence has room for last answers of so
    many tokens, see `prompted_answers.room`. The counts are examples, tokens, trained_tokens (targets),
    sequences, and fill, the share of the sequences' tokens that is not padding.
    """
    sequences = pack([min(seq_len, _tokens_with_room(example, answer_tokens)) for example in examples], seq_len)
    packed = [[chat for index in sequence for chat in examples[index]] for sequence in sequences]
    documents = [*chain.from_iterable(packed)]
    starts = _starts(len(chat.ids) for chat in documents)
    ids = np.concatenate([chat.ids for chat in documents])
    trained = np.concatenate([chat.trained for chat in documents])
    trained[starts[:-1]] = False
    arrays = {
        "ids": ids.astype(np.min_scalar_type(ids.max())),
        "trained": trained.astype(np.uint8),
        "documents": starts,
        "sequences": _starts(map(len, packed)),
    }
    for name in ARRAYS:
        np.save(folder / f"{split}-{name}.npy", arrays[name])
    return {
        "examples": len(examples),
        "tokens": len(ids),
        "trained_tokens": int(trained.sum()),
        "sequences": len(sequences),
        "fill": len(ids) / (len(sequences) * seq_len),
    }


def tokens_of(example: Example) -> int:
    return sum(len(chat.ids) for chat in example)


def _tokens_with_room(example: Example, answer_tokens: int) -> int:
    """The number of tokens of an example if its last answer had at least `answer_tokens`."""
    if not answer_tokens:
        return tokens_of(example)
    begins, _ = runs(example[-1].trained)
    return max(tokens_of(example), int(begins[-1]) + answer_tokens)


def _starts(lengths: Iterable[int]) -> np.ndarray:
    """Return the beginning of each part and the end of the last one, int64."""
    return np.array([0, *accumulate(lengths)], np.int64)
