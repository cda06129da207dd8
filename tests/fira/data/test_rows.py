"""Rows of tokens: their lengths, and their concatenation."""

import numpy as np

from fira.data.rows import Rows, concatenate

IGNORED = -100
TOKENS = np.arange(12).reshape(3, 4)
TARGETS = np.array([[1, 2, 3, 4], [IGNORED, 6, 7, IGNORED], [IGNORED] * 4])
DOCUMENTS = np.array([[0, 0, 1, 2], [0, 0, 0, 0], [0, 1, -1, -1]])


def test_sequence_ends_with_its_last_trained_target_or_last_document():
    assert Rows(TOKENS, TARGETS).lengths().tolist() == [4, 3, 0]
    assert Rows(TOKENS, TARGETS, DOCUMENTS).lengths().tolist() == [4, 4, 2]


def test_concatenation_of_rows_with_and_without_documents():
    plain, packed = Rows(TOKENS, TARGETS), Rows(TOKENS + 20, TARGETS, DOCUMENTS)
    assert concatenate([plain, plain]).documents is None
    joined = concatenate([plain, packed])
    assert joined.tokens.tolist() == [*TOKENS.tolist(), *(TOKENS + 20).tolist()]
    assert joined.targets.tolist() == TARGETS.tolist() * 2
    assert joined.documents is not None
    assert joined.documents.tolist() == [[0, 0, 0, 0], [0, 0, 0, -1], [-1] * 4, *DOCUMENTS.tolist()]
    assert joined.lengths().tolist() == [4, 3, 0, 4, 4, 2]
