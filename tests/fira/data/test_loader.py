"""Sequences of training and validation: order, windows and resumption."""

import re
from pathlib import Path

import numpy as np
import pytest

from fira.data.loader import Loader, ValidationSequences
from fira.data.packed import PackedTokens, TokenSpan
from fira.data.text_windows import TextWindows
from fira.errors import UserError
from fira.nn.cross_entropy import IGNORE_INDEX


def packed(folder: Path, count: int) -> PackedTokens:
    """Tokens 0, 1, 2, …, such that the value of a token is its position."""
    folder.mkdir(exist_ok=True)
    np.save(folder / "t.npy", np.arange(count, dtype=np.uint16))
    return PackedTokens([TokenSpan(folder / "t.npy")])


def test_epoch_contains_every_window_once_and_is_reshuffled(tmp_path) -> None:
    loader = Loader(TextWindows(packed(tmp_path, 205), 10), seed=1)
    tokens, targets, *_ = loader.batch(0, 40)
    assert tokens.shape == targets.shape == (40, 10)
    assert tokens.dtype == targets.dtype == np.int64
    np.testing.assert_array_equal(targets, tokens + 1)
    for epoch in (tokens[:20], tokens[20:]):
        assert sorted(epoch.flatten()) == list(range(200))
    assert tokens[:20].tolist() != tokens[20:].tolist()
    assert tokens[:20].tolist() != sorted(tokens[:20].tolist())


def test_order_of_an_epoch_is_numpy_permutation_seeded_by_seed_and_epoch(tmp_path) -> None:
    """A resumed run depends on this order, so a change of it must fail here."""
    tokens, *_ = Loader(TextWindows(packed(tmp_path, 205), 10), seed=3).batch(0, 60)
    for epoch in range(3):
        order = np.random.default_rng([3, epoch]).permutation(20)
        assert (tokens[20 * epoch : 20 * epoch + 20, 0] // 10).tolist() == order.tolist()


def test_sequence_is_a_function_of_number_and_seed(tmp_path) -> None:
    tokens = packed(tmp_path, 101)
    in_order, *_ = Loader(TextWindows(tokens, 10), seed=7).batch(0, 35)
    loader = Loader(TextWindows(tokens, 10), seed=7)
    for first, count in ((27, 8), (0, 3), (8, 5), (9, 2)):  # out of order and across epochs
        np.testing.assert_array_equal(loader.batch(first, count)[0], in_order[first : first + count])
    assert not np.array_equal(Loader(TextWindows(tokens, 10), seed=8).batch(0, 10)[0], in_order[:10])


def test_windows_use_all_tokens_that_have_a_target(tmp_path) -> None:
    for count, windows in ((11, 1), (20, 1), (21, 2), (22, 2)):
        assert len(TextWindows(packed(tmp_path, count), 10)) == windows


def test_too_few_tokens_for_one_window_raise(tmp_path) -> None:
    with pytest.raises(UserError, match=r"11 training tokens, sequences of 11: .*--seq-len"):
        Loader(TextWindows(packed(tmp_path, 11), 11), seed=0)


@pytest.mark.parametrize("count", [2, 10, 11, 12, 30, 31, 35])
def test_validation_predicts_every_token_but_the_first_once(tmp_path, count: int) -> None:
    sequences = ValidationSequences(TextWindows(packed(tmp_path, count), 10, complete=False))
    inputs, targets, *_ = sequences.batch(0, len(sequences) + 3)  # three rows beyond the end
    real = targets != IGNORE_INDEX
    assert targets[real].tolist() == list(range(1, count))
    np.testing.assert_array_equal(inputs[real], targets[real] - 1)
    assert not inputs[~real].any()
    assert not real[-3:].any()
    assert real[: len(sequences)].any(axis=1).all()


def test_limited_validation_is_in_order_and_at_equal_distances(tmp_path) -> None:
    tokens = packed(tmp_path, 101)
    sequences = ValidationSequences(TextWindows(tokens, 10, complete=False), limit=4)
    assert len(sequences) == 4
    assert sequences.batch(0, 4)[0][:, 0].tolist() == [0, 20, 50, 70]
    assert sequences.batch(1, 2)[0][:, 0].tolist() == [20, 50]
    for limit in range(1, 15):
        windows = (
            ValidationSequences(TextWindows(tokens, 10, complete=False), limit).batch(0, min(limit, 10))[0][:, 0] // 10
        )
        assert windows[0] == 0
        assert set(np.diff([*windows, 10])) <= {10 // min(limit, 10), -(-10 // min(limit, 10))}


def test_validation_without_a_token_to_predict_raises(tmp_path) -> None:
    with pytest.raises(UserError, match="1 validation tokens"):
        ValidationSequences(TextWindows(packed(tmp_path, 1), 10, complete=False))


@pytest.mark.parametrize("epoch", range(4))
def test_first_read_in_a_later_epoch_equals_an_uninterrupted_run(tmp_path, epoch: int) -> None:
    tokens = packed(tmp_path, 101)
    expected, *_ = Loader(TextWindows(tokens, 10), seed=7).batch(0, 40)
    batch, *_ = Loader(TextWindows(tokens, 10), seed=7).batch(10 * epoch, 3)
    np.testing.assert_array_equal(batch, expected[10 * epoch : 10 * epoch + 3])


def test_separator_begins_a_document_of_a_window(tmp_path) -> None:
    """Against a division of the text at every separator; tokens, targets and padding are those of plain windows."""
    ids = np.random.default_rng(0).integers(0, 5, 104)
    np.save(tmp_path / "t.npy", ids.astype(np.uint16))
    tokens = PackedTokens([TokenSpan(tmp_path / "t.npy")])
    plain = ValidationSequences(TextWindows(tokens, 10, complete=False)).batch(0, 13)
    rows = ValidationSequences(TextWindows(tokens, 10, complete=False, separator=3)).batch(0, 13)
    for one, other in zip(rows[:2], plain[:2], strict=True):
        np.testing.assert_array_equal(one, other)
    assert rows.documents is not None
    np.testing.assert_array_equal(rows.lengths(), plain.lengths())
    expected = np.full((13, 10), -1)
    for start in range(0, 103, 10):
        window = "".join(map(str, ids[start : min(start + 10, 103)]))
        parts = re.findall("^[^3]+|3[^3]*", window)
        numbers = [number for number, part in enumerate(parts) for _ in part]
        expected[start // 10, : len(numbers)] = numbers
    np.testing.assert_array_equal(rows.documents, expected)
    assert rows.documents.max() > 2
