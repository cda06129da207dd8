"""Owners of tensors, and the exchange of what they have computed."""

import pytest

from pipeline import owned_tensors
from pipeline.owned_tensors import balanced_owners
from tests.launch import run_function


def test_owners_have_about_equal_sizes() -> None:
    assert balanced_owners([5, 3, 3, 1], 2) == [0, 1, 1, 0]
    assert balanced_owners([5, 3], 1) == [0, 0]
    assert balanced_owners([], 3) == []
    assert balanced_owners([2], 3) == [0]
    assert balanced_owners([1, 5, 3, 3], 2) == [0, 0, 1, 1]
    assert balanced_owners([7.0] * 5, 3) == [0, 1, 2, 0, 1]
    sizes = [7 * n % 31 + 1 for n in range(100)]
    sums = [sum(s for s, o in zip(sizes, balanced_owners(sizes, 4), strict=True) if o == rank) for rank in range(4)]
    assert max(sums) - min(sums) <= max(sizes)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_rank_gets_the_tensors_of_their_owners(ranks: int) -> None:
    large = owned_tensors.LIMIT // 8 + 1  # more than what is gathered at a time
    sizes = [3, 1, large, 2, 7, 5, large - 1, 2]
    owners = [0, ranks - 1, 0, 0, ranks - 1, 0, ranks - 1, 0]
    for of_rank in run_function(ranks, "tests.ranks.tree_ranks", "shared", sizes=sizes, owners=owners):
        assert of_rank == [[*map(float, range(size))] for size in sizes]
