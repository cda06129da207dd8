from pathlib import Path

import numpy as np
import pytest

from fira.data.loader import IGNORE, Loader, Sequential
from fira.data.packed import PackedTokens
from fira.errors import UserError


def packed(folder: Path, count: int) -> PackedTokens:
    """Tokens 0, 1, 2, …: a token's value is its place."""
    np.save(folder / "t.npy", np.arange(count, dtype=np.uint16))
    return PackedTokens([folder / "t.npy"])


def test_an_epoch_is_every_window_once_and_the_next_is_in_another_order(tmp_path) -> None:
    loader = Loader(packed(tmp_path, 205), 10, seed=1)
    tokens, targets = loader.batch(0, 40)
    assert tokens.shape == targets.shape == (40, 10)
    assert tokens.dtype == targets.dtype == np.int64
    np.testing.assert_array_equal(targets, tokens + 1)
    for epoch in (tokens[:20], tokens[20:]):
        assert sorted(epoch.flatten()) == list(range(200))
    assert tokens[:20].tolist() != tokens[20:].tolist()
    assert tokens[:20].tolist() != sorted(tokens[:20].tolist())


def test_a_sequence_depends_on_its_number_and_the_seed_alone(tmp_path) -> None:
    tokens = packed(tmp_path, 101)
    whole, _ = Loader(tokens, 10, seed=7).batch(0, 35)
    other = Loader(tokens, 10, seed=7)
    for first, count in ((27, 8), (0, 3), (8, 5), (9, 2)):  # out of order, across epochs
        np.testing.assert_array_equal(other.batch(first, count)[0], whole[first : first + count])
    assert not np.array_equal(Loader(tokens, 10, seed=8).batch(0, 10)[0], whole[:10])


def test_a_restored_loader_goes_on_where_it_was(tmp_path) -> None:
    tokens = packed(tmp_path, 101)
    straight = Loader(tokens, 10, seed=3)
    first, second = straight.next(7), straight.next(7)
    saved = Loader(tokens, 10, seed=3)
    np.testing.assert_array_equal(saved.next(7)[0], first[0])
    resumed = Loader(tokens, 10, seed=3)
    resumed.load_state_dict(saved.state_dict())
    np.testing.assert_array_equal(resumed.next(7)[1], second[1])


def test_too_few_tokens_for_one_window(tmp_path) -> None:
    tokens = packed(tmp_path, 11)
    assert Loader(tokens, 10, seed=0).windows == 1
    with pytest.raises(UserError, match="--seq-len"):
        Loader(tokens, 11, seed=0)


@pytest.mark.parametrize("count", [2, 10, 11, 12, 30, 31, 35])
def test_validation_predicts_every_token_but_the_first_once(tmp_path, count: int) -> None:
    sequences = Sequential(packed(tmp_path, count), 10)
    inputs, targets = sequences.batch(0, len(sequences) + 3)  # three rows beyond the end
    real = targets != IGNORE
    assert targets[real].tolist() == list(range(1, count))
    np.testing.assert_array_equal(inputs[real], targets[real] - 1)
    assert not real[-3:].any()
    assert real[: len(sequences)].any(axis=1).all()


def test_limited_validation_is_spread_evenly_and_in_order(tmp_path) -> None:
    sequences = Sequential(packed(tmp_path, 101), 10, limit=4)
    assert sequences.batch(0, 4)[0][:, 0].tolist() == [0, 20, 50, 70]
    assert sequences.batch(1, 2)[0][:, 0].tolist() == [20, 50]
    with pytest.raises(UserError, match="validation"):
        Sequential(packed(tmp_path, 1), 10)
