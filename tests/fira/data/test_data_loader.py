from pathlib import Path

import numpy as np
import pytest

from fira.data.loader import IGNORE_INDEX, Loader, ValidationSequences
from fira.data.mixture import Joined, Mixture, interleave, parse_mixture
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
    sequences = ValidationSequences(packed(tmp_path, count), 10)
    inputs, targets = sequences.batch(0, len(sequences) + 3)  # three rows beyond the end
    real = targets != IGNORE_INDEX
    assert targets[real].tolist() == list(range(1, count))
    np.testing.assert_array_equal(inputs[real], targets[real] - 1)
    assert not real[-3:].any()
    assert real[: len(sequences)].any(axis=1).all()


def test_limited_validation_is_spread_evenly_and_in_order(tmp_path) -> None:
    sequences = ValidationSequences(packed(tmp_path, 101), 10, limit=4)
    assert sequences.batch(0, 4)[0][:, 0].tolist() == [0, 20, 50, 70]
    assert sequences.batch(1, 2)[0][:, 0].tolist() == [20, 50]
    with pytest.raises(UserError, match="validation"):
        ValidationSequences(packed(tmp_path, 1), 10)


def test_a_mixture_reads_each_source_in_its_share_and_in_its_own_order(tmp_path) -> None:
    """Sequence by sequence against counting turns, and also out of order, as ranks and resumed runs read it."""
    sources = []
    for number, length in enumerate((301, 41, 101)):
        (tmp_path / str(number)).mkdir()
        sources.append(Loader(packed(tmp_path / str(number), length), 10, seed=number))
    weights = [0.62, 0.08, 0.3]
    tokens, targets = Mixture(sources, weights).batch(0, 2500)
    turns = interleave(weights)
    counts = np.bincount(turns)
    assert counts.tolist() == [620, 80, 300]
    spread = [abs(np.cumsum(turns == s) - w * np.arange(1, 1001)).max() for s, w in enumerate(weights)]
    assert max(spread) < 1.5  # the shares hold within every batch
    used = [0, 0, 0]
    for n in range(2500):
        source = turns[n % 1000]
        np.testing.assert_array_equal(tokens[n], sources[source].batch(used[source], 1)[0][0])
        used[source] += 1
    again = Mixture(sources, weights)
    for first, count in ((990, 30), (3, 5), (2400, 100)):
        np.testing.assert_array_equal(again.batch(first, count)[1], targets[first : first + count])


def test_a_mixture_of_one_is_its_source_and_shares_below_the_finest_still_come(tmp_path) -> None:
    loader = Loader(packed(tmp_path, 101), 10, seed=1)
    np.testing.assert_array_equal(Mixture([loader], [1.0]).batch(995, 20)[0], loader.batch(995, 20)[0])
    assert np.bincount(interleave([1, 1e-9])).tolist() == [999, 1]
    assert np.bincount(interleave([1, 1, 1])).tolist() == [334, 333, 333]


def test_joined_validation_is_one_source_after_another(tmp_path) -> None:
    (tmp_path / "b").mkdir()
    parts = [ValidationSequences(packed(tmp_path, 31), 10), ValidationSequences(packed(tmp_path / "b", 15), 10)]
    joined = Joined(parts)
    assert len(joined) == 5
    for kind in (0, 1):
        expected = np.concatenate([parts[0].batch(0, 3)[kind], parts[1].batch(0, 4)[kind]])
        np.testing.assert_array_equal(joined.batch(0, 7)[kind], expected)
        np.testing.assert_array_equal(joined.batch(2, 3)[kind], expected[2:5])


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        (None, [(None, 1)]),
        ("plain.txt", [("plain.txt", 1)]),
        ("a.txt=3,b=c.csv=1", [("a.txt", 0.75), ("b=c.csv", 0.25)]),
        ("only.txt=0.2", [("only.txt", 1)]),
    ],
)
def test_sources_are_given_with_weights(data: str | None, parts: list[tuple[str | None, float]]) -> None:
    assert parse_mixture(data) == parts


@pytest.mark.parametrize("data", ["a.txt=0.7,b.txt", "a.txt=x", "a.txt=0", "=1", "a=inf", "a=1,=2"])
def test_weights_that_are_none_are_one_line(data: str) -> None:
    with pytest.raises(UserError, match=r"as in .*hi\.txt=0\.3"):
        parse_mixture(data)


def test_a_path_may_look_like_a_mixture(tmp_path) -> None:
    (tmp_path / "a=1").write_text("x")
    assert parse_mixture(str(tmp_path / "a=1")) == [(str(tmp_path / "a=1"), 1)]
