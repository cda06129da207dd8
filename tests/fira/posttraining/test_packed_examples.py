"""Packed sequences for training and validation, compared with the examples that were written."""

from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fira.data.chat_template import EncodedChat
from fira.data.loader import Loader, ValidationSequences
from fira.data.rows import Rows
from fira.nn.cross_entropy import IGNORE_INDEX
from fira.posttraining.packed_examples import PackedExamples, write_examples
from fira.posttraining.preference_pairs import PreferencePairs

SEQ_LEN = 12
examples = st.lists(
    st.lists(st.tuples(st.integers(0, 70_000), st.booleans()), min_size=1, max_size=SEQ_LEN), min_size=1, max_size=20
)


def encoded(pairs: list[tuple[int, bool]]) -> EncodedChat:
    ids, trained = zip(*pairs, strict=True)
    return EncodedChat(np.array(ids, np.uint32), np.array(trained), np.array(trained), "x")


def documents(rows: Rows) -> Counter[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The tokens and the targets of each document in the rows. Padding is checked."""
    found: Counter[tuple[tuple[int, ...], tuple[int, ...]]] = Counter()
    for tokens, targets, numbers in zip(rows.tokens, rows.targets, rows.documents, strict=True):
        length = int((numbers >= 0).sum())
        assert (numbers[length:] == -1).all()
        assert (targets[length:] == IGNORE_INDEX).all()
        assert not tokens[length:].any()
        for number in range(numbers.max() + 1):
            (positions,) = np.nonzero(numbers == number)
            assert positions.tolist() == list(range(positions[0], positions[-1] + 1))
            found[tuple(tokens[positions].tolist()), tuple(targets[positions].tolist())] += 1
    return found


def expected(pairs: list[tuple[int, bool]]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    targets = [token if trained else IGNORE_INDEX for token, trained in pairs[1:]]
    return tuple(token for token, _ in pairs), (*targets, IGNORE_INDEX)


@settings(max_examples=100, deadline=None)
@given(examples, st.integers(0, 5))
def test_epoch_contains_every_example_once_and_whole(written: list[list[tuple[int, bool]]], seed: int) -> None:
    with TemporaryDirectory() as name:
        counts = write_examples(Path(name), "train-0", [(encoded(pairs),) for pairs in written], SEQ_LEN)
        packed = PackedExamples(Path(name), "train-0", SEQ_LEN)
        loader = Loader(packed, seed)
        epochs = [loader.batch(epoch * len(packed), len(packed)) for epoch in range(2)]
        for rows in (*epochs, ValidationSequences(packed).batch(0, len(packed) + 2)):
            assert all(array.dtype == np.int64 for array in rows[:3])
            assert documents(Rows(*(array[: len(packed)] for array in rows[:3]))) == Counter(map(expected, written))
        assert (rows.documents[len(packed) :] == -1).all()
        assert (rows.targets[len(packed) :] == IGNORE_INDEX).all()
        assert counts["trained_tokens"] == (epochs[0].targets != IGNORE_INDEX).sum()
        assert counts["tokens"] == (epochs[0].documents >= 0).sum() == sum(map(len, written))
        assert counts["fill"] == (epochs[0].documents >= 0).mean()
        assert (counts["examples"], counts["sequences"]) == (len(written), len(packed))


@pytest.fixture
def packed(tmp_path: Path) -> PackedExamples:
    """Ten sequences of one example each, whose tokens are the number of the example."""
    write_examples(tmp_path, "train-0", [(encoded([(n, True)] * (12 - n % 3)),) for n in range(10)], SEQ_LEN)
    return PackedExamples(tmp_path, "train-0", SEQ_LEN)


def test_sequence_is_a_function_of_number_and_seed(packed: PackedExamples) -> None:
    in_order = Loader(packed, seed=7).batch(0, 35)
    loader = Loader(packed, seed=7)
    for first, count in ((27, 8), (0, 3), (8, 5), (9, 2)):  # out of order and across epochs
        for array, other in zip(loader.batch(first, count)[:3], in_order[:3], strict=True):
            np.testing.assert_array_equal(array, other[first : first + count])
    orders = [in_order.tokens[10 * epoch : 10 * epoch + 10, 0].tolist() for epoch in range(3)]
    assert len({tuple(order) for order in orders}) == 3
    assert orders != [Loader(packed, seed=8).batch(10 * epoch, 10).tokens[:, 0].tolist() for epoch in range(3)]


def test_limited_validation_is_at_equal_distances(packed: PackedExamples) -> None:
    every = ValidationSequences(packed).batch(0, 10).tokens[:, 0].tolist()
    validation = ValidationSequences(packed, limit=4)
    assert len(validation) == 4
    assert validation.batch(0, 4).tokens[:, 0].tolist() == [every[number] for number in (0, 2, 5, 7)]
    assert validation.batch(2, 2).tokens[:, 0].tolist() == [every[number] for number in (5, 7)]
    assert len(ValidationSequences(packed, limit=99)) == 10


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(2, 6), st.integers(2, 6)), min_size=1, max_size=15))
def test_documents_of_a_pair_are_next_to_each_other_with_their_reference(lengths: list[tuple[int, int]]) -> None:
    """Document d of pair n consists of the token 2n + d, and its log-probability is −(2n + d)."""
    written = [tuple(encoded([(2 * n + d, True)] * pair[d]) for d in (0, 1)) for n, pair in enumerate(lengths)]
    with TemporaryDirectory() as name:
        counts = write_examples(Path(name), "train-0", written, SEQ_LEN)
        packed = PackedExamples(Path(name), "train-0", SEQ_LEN)
        first_tokens = np.load(Path(name, "train-0-ids.npy"))[np.load(Path(name, "train-0-documents.npy"))[:-1]]
        rows = PreferencePairs(packed, -first_tokens.astype(float)).rows(range(len(packed)), len(packed) + 1)
        documents = rows.stored["documents"]
        found = []
        for tokens, numbers, reference in zip(rows.tokens, documents, rows.stored["reference"], strict=True):
            assert reference.shape == (SEQ_LEN // 4, 2)
            for number in range(numbers.max() + 1):
                (token,) = {*tokens[numbers == number].tolist()}
                assert token % 2 == number % 2
                assert reference[number // 2, number % 2] == -token
                found.append((token, int((numbers == number).sum())))
            assert not reference.reshape(-1)[numbers.max() + 1 :].any()
            assert all(found[i][0] + 1 == found[i + 1][0] for i in range(0, len(found), 2))
    assert sorted(found) == [(2 * n + d, pair[d]) for n, pair in enumerate(lengths) for d in (0, 1)]
    assert (counts["examples"], counts["tokens"]) == (len(lengths), sum(map(sum, lengths)))


def test_reference_of_other_data_is_refused(packed: PackedExamples) -> None:
    with pytest.raises(ValueError, match="9 log-probabilities for 10 documents"):
        PreferencePairs(packed, np.zeros(9))
