from pathlib import Path

import numpy as np
import pytest

from fira.data.loader import Loader, ValidationSequences
from fira.data.mixture import Joined, Mixture, interleave, parse_mixture
from fira.data.text_windows import TextWindows
from fira.errors import UserError
from tests.fira.data.test_loader import packed

WEIGHTS = [0.62, 0.08, 0.3]


@pytest.fixture
def loaders(tmp_path: Path) -> list[Loader]:
    """Sources of 30, 4 and 10 windows."""
    lengths = (301, 41, 101)
    return [Loader(TextWindows(packed(tmp_path / str(seed), length), 10), seed) for seed, length in enumerate(lengths)]


def test_proportions_hold_in_a_period_and_within_every_batch() -> None:
    sources = interleave(WEIGHTS)
    assert np.bincount(sources).tolist() == [620, 80, 300]
    deviation = [abs(np.cumsum(sources == s) - w * np.arange(1, 1001)).max() for s, w in enumerate(WEIGHTS)]
    assert max(deviation) < 1.5
    np.testing.assert_array_equal(interleave([62, 8, 30]), sources)  # weights need not sum to 1


@pytest.mark.parametrize(
    ("weights", "counts"),
    [
        ([1, 1e-9], [999, 1]),  # every source has at least one sequence
        ([1, 1, 1], [334, 333, 333]),  # equal remainders: the first source
        ([0.3337, 0.3338, 0.3325], [334, 334, 332]),  # the largest remainders are rounded up
        ([1.0], [1000]),
    ],
)
def test_counts_of_a_period_are_rounded_to_the_period(weights: list[float], counts: list[int]) -> None:
    assert np.bincount(interleave(weights)).tolist() == counts


def test_each_source_is_read_in_its_own_order(loaders: list[Loader]) -> None:
    """Each sequence is the next one of its source, also when the numbers are read out of order."""
    tokens, targets, *_ = Mixture(loaders, WEIGHTS).batch(0, 2500)
    sources = interleave(WEIGHTS)
    consumed = [0, 0, 0]
    for number in range(2500):
        source = sources[number % 1000]
        expected = loaders[source].batch(consumed[source], 1)
        np.testing.assert_array_equal(tokens[number], expected[0][0])
        np.testing.assert_array_equal(targets[number], expected[1][0])
        consumed[source] += 1
    mixture = Mixture(loaders, WEIGHTS)
    for first, count in ((990, 30), (3, 5), (2400, 100)):
        np.testing.assert_array_equal(mixture.batch(first, count)[1], targets[first : first + count])


def test_mixture_of_one_source_equals_its_loader(loaders: list[Loader]) -> None:
    np.testing.assert_array_equal(Mixture(loaders[:1], [1.0]).batch(995, 20)[0], loaders[0].batch(995, 20)[0])


def test_joined_validation_concatenates_its_sources(tmp_path) -> None:
    parts = [
        ValidationSequences(TextWindows(packed(tmp_path / name, count), 10, complete=False))
        for name, count in (("a", 31), ("b", 15), ("c", 2))
    ]
    joined = Joined(parts)
    assert len(joined) == 6
    for index in (0, 1):
        expected = np.concatenate([part.batch(0, len(part))[index] for part in parts] + [parts[0].batch(3, 2)[index]])
        np.testing.assert_array_equal(joined.batch(0, 8)[index], expected)  # two rows of padding at the end
        np.testing.assert_array_equal(joined.batch(2, 3)[index], expected[2:5])
        np.testing.assert_array_equal(joined.batch(6, 2)[index], expected[6:])


@pytest.mark.parametrize(
    ("data", "sources"),
    [
        (None, [(None, 1)]),
        ("plain.txt", [("plain.txt", 1)]),
        ("a.txt=3,b=c.csv=1", [("a.txt", 0.75), ("b=c.csv", 0.25)]),
        ("only.txt=0.2", [("only.txt", 1)]),
    ],
)
def test_sources_are_parsed_with_normalised_weights(data: str | None, sources: list[tuple[str | None, float]]) -> None:
    assert parse_mixture(data) == sources


@pytest.mark.parametrize("data", ["a.txt=0.7,b.txt", "a.txt=x", "a.txt=0", "=1", "a=inf", "a=nan", "a=-1", "a=1, =2"])
def test_invalid_weights_raise_one_line_error(data: str) -> None:
    with pytest.raises(UserError, match=r"as in .*hi\.txt=0\.3") as caught:
        parse_mixture(data)
    assert "\n" not in str(caught.value)


def test_existing_path_with_equals_sign_is_one_source(tmp_path) -> None:
    (tmp_path / "a=1").write_text("x")
    assert parse_mixture(str(tmp_path / "a=1")) == [(str(tmp_path / "a=1"), 1)]
