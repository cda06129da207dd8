"""The prompts and answers of packed chats, and sequences that are packed with other answers.

tokens      p p p a a │ q q b b b b        p q: prompts, a b: the last answers of two chats
sampled     p p p x x x │ q q y – –        x y: answers that a model has generated, –: padding
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from fira.data.rows import Rows
from fira.nn.cross_entropy import IGNORE_INDEX


class PromptedAnswer(NamedTuple):
    """The tokens of the last answer of a chat, and those before it."""

    prompt: list[int]
    answer: list[int]


def prompted_answers(rows: Rows) -> list[list[PromptedAnswer]]:
    """Return the documents with an answer of each sequence of packed chats, without what follows the answer."""
    assert rows.documents is not None
    result: list[list[PromptedAnswer]] = []
    for tokens, targets, documents in zip(rows.tokens, rows.targets, rows.documents, strict=True):
        starts = np.flatnonzero(np.diff(documents, prepend=-1, append=-1))  # also the end of the last document
        spans = [slice(*span) for span in pairwise(starts)]
        found = (_last_answer(tokens[span], targets[span]) for span in spans)
        result.append([document for document in found if document])
    return result


def _last_answer(tokens: np.ndarray, targets: np.ndarray) -> PromptedAnswer | None:
    begins, ends = runs(targets != IGNORE_INDEX)
    if not len(begins):
        return None
    first, end = int(begins[-1]) + 1, int(ends[-1]) + 1  # a token is the target of the one before it
    return PromptedAnswer(tokens[:first].tolist(), tokens[first:end].tolist())


def runs(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first index of each run of true values in a mask, and the index after its last one."""
    change = np.diff(mask.astype(np.int8), prepend=0, append=0)
    return np.flatnonzero(change == 1), np.flatnonzero(change == -1)


def packed(sequences: Sequence[Sequence[PromptedAnswer]], seq_len: int) -> Rows:
    """Return sequences of these documents, with the answers as targets. Each fits into `seq_len` tokens."""
    tokens = np.zeros((len(sequences), seq_len), np.int64)
    targets, documents = np.full_like(tokens, IGNORE_INDEX), np.full_like(tokens, -1)
    for row, sequence in enumerate(sequences):
        start = 0
        for number, (prompt, answer) in enumerate(sequence):
            begin, end = start + len(prompt), start + len(prompt) + len(answer)
            tokens[row, start:end] = prompt + answer
            targets[row, begin - 1 : end - 1] = answer
            documents[row, start:end] = number
            start = end
    return Rows(tokens, targets, documents)


def room(document: PromptedAnswer, answer_tokens: int, seq_len: int) -> int:
    """The largest number of tokens of another answer: that of the answer, but `answer_tokens` if they are more and fit.

    Sequences are packed with this room, see `packed_examples`.
    """
    return min(max(len(document.answer), answer_tokens), seq_len - len(document.prompt))
