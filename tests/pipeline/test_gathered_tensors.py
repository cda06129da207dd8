"""Tensors that each rank has only while they are used."""

import pytest

from tests.launch import run_function


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_tensors_of_other_owners_have_memory_only_while_they_are_used(ranks: int) -> None:
    """Autograd saves them in the forward, and reads them in the backward, when they have been gathered again."""
    sizes, owners = [3, 17, 5, 100], [0, ranks - 1, ranks // 2, 0]
    sums = [size * (size + 1) / 2 for size in sizes]
    squares = sum(size * (size + 1) * (2 * size + 1) / 6 for size in sizes)
    results = run_function(ranks, "tests.ranks.tree_ranks", "gathered", sizes=sizes, owners=owners)
    for rank, (phases, gradients) in enumerate(results):
        own = [owner == rank for owner in owners]
        assert phases == [own, [True] * 4, own]
        assert gradients == [squares + 2 * sums[0], *(2 * total for total in sums), 2 * sizes[0]]
