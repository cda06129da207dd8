"""Packing, compared with the best packing of small cases and with best-fit decreasing as a plain loop."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fira.posttraining.packing import pack


def best_fit_decreasing(lengths: list[int], capacity: int) -> list[int]:
    """The rooms of all sequences, sorted; they do not depend on the choice between sequences with equal room."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else capacity) - length)
    return sorted(rooms)


def fewest(lengths: list[int], capacity: int) -> int:
    """The number of sequences of the best packing, by trying all places of each example."""

    def tried(index: int, rooms: list[int]) -> int:
        if index == len(lengths):
            return len(rooms)
        places = [number for number, room in enumerate(rooms) if room >= lengths[index]]
        counts = [
            tried(index + 1, [room - lengths[index] * (n == place) for n, room in enumerate(rooms)]) for place in places
        ]
        return min([*counts, tried(index + 1, [*rooms, capacity - lengths[index]])])

    return tried(0, [])


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 40).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c), max_size=60))))
def test_every_example_is_in_one_sequence_as_in_a_plain_loop(case: tuple[int, list[int]]) -> None:
    capacity, lengths = case
    sequences = pack(lengths, capacity)
    assert sorted(index for sequence in sequences for index in sequence) == list(range(len(lengths)))
    rooms = [capacity - sum(lengths[index] for index in sequence) for sequence in sequences]
    assert sorted(rooms) == best_fit_decreasing(lengths, capacity)
    assert all(room >= 0 for room in rooms)
    assert pack(np.array(lengths, np.int64), capacity) == sequences


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 10), min_size=1, max_size=7))
def test_number_of_sequences_is_close_to_the_best_one(lengths: list[int]) -> None:
    """At most 11/9 of the best number plus 6/9 (Dósa 2007)."""
    assert len(pack(lengths, 10)) <= 11 / 9 * fewest(lengths, 10) + 6 / 9


def test_examples_of_the_docstring() -> None:
    assert pack([3, 7, 5, 2, 3], 8) == [[1], [2, 0], [4, 3]]
    assert pack([], 8) == []


def test_large_case_is_nearly_full() -> None:
    lengths = np.random.default_rng(0).integers(1, 2049, 100_000)
    sequences = pack(lengths, 2048)
    filled = Counter({number: int(lengths[sequence].sum()) for number, sequence in enumerate(sequences)})
    assert max(filled.values()) <= 2048
    assert sum(filled.values()) / (2048 * len(sequences)) > 0.98


@pytest.mark.parametrize("length", [0, 9])
def test_example_that_cannot_be_packed_raises(length: int) -> None:
    with pytest.raises(ValueError, match=f"{length} tokens"):
        pack([1, length], 8)
