"""The partition of layers into stages compared with brute force."""

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.partition import partition


def sums(costs: list[int], boundaries: tuple[int, ...]) -> list[int]:
    return [sum(costs[a:b]) for a, b in pairwise([0, *boundaries, len(costs)])]


@given(st.lists(st.integers(0, 20), min_size=1, max_size=9), st.data())
def test_largest_stage_is_minimal(costs, data):
    stages = data.draw(st.integers(1, len(costs)))
    parts = partition(costs, stages)
    assert [i for part in parts for i in part] == list(range(len(costs)))
    assert len(parts) == stages
    assert all(parts)
    best = min(max(sums(costs, boundaries)) for boundaries in combinations(range(1, len(costs)), stages - 1))
    assert max(sum(costs[i] for i in part) for part in parts) == best


@given(st.lists(st.integers(0, 20), min_size=2, max_size=9))
def test_two_stages_with_equal_largest_sums_are_ranked_by_squares_then_boundaries(costs):
    def rank(boundary: int) -> tuple[int, int, int]:
        parts = sums(costs, (boundary,))
        return max(parts), sum(part**2 for part in parts), boundary

    assert partition(costs, 2)[0].stop == min(range(1, len(costs)), key=rank)


def test_other_stages_are_balanced_as_well():
    assert partition([5, 1, 1, 1, 1], 3) == [range(1), range(1, 3), range(3, 5)]


def test_first_boundaries_are_preferred():
    assert partition([0, 0, 0], 2) == [range(1), range(1, 3)]


@pytest.mark.parametrize("stages", [0, 3])
def test_impossible_number_of_stages_raises(stages):
    with pytest.raises(ValueError, match=f"2 layers cannot be partitioned into {stages} stages"):
        partition([1.0, 1.0], stages)


def test_squares_rank_partitions_with_the_same_largest_sum():
    """6, 7, 2, 3 has the squares 98 and 1, 5, 7, 5 has 100; their sums of cubes are equal."""
    assert partition([1, 5, 7, 2, 3], 4) == [range(2), range(2, 3), range(3, 4), range(4, 5)]


@given(st.lists(st.integers(0, 20), min_size=1, max_size=9), st.data())
def test_scaled_costs_give_the_same_partition(costs, data):
    """Scaling by a power of two is exact, so that equal partitions stay equal."""
    stages = data.draw(st.integers(1, len(costs)))
    for factor in (2.0**-20, 2.0**20):
        assert partition([factor * cost for cost in costs], stages) == partition(costs, stages)
