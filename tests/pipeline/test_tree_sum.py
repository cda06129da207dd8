"""The tree of micro-batches: its nodes, the order of its sums, and its completion over ranks."""

import math
from itertools import pairwise

import pytest
import torch

from pipeline.tree_sum import TreeSum, leaves_of, nodes_by_rank
from tests.launch import run_function


def written_out(first: int, stop: int, low: float, high: float, values: torch.Tensor) -> torch.Tensor | None:
    """The sum of leaves first … stop − 1 by recursion: those below the middle of [low, high), plus the others."""
    if stop <= first:
        return None
    if stop - first == 1:
        return values[first]
    middle = (low + high) / 2
    cut = min(max(math.ceil(middle * len(values)), first), stop)
    left, right = written_out(first, cut, low, middle, values), written_out(cut, stop, middle, high, values)
    return right if left is None else left if right is None else left + right


def numbers(leaves: int) -> torch.Tensor:
    """Numbers whose sum depends on the order of the additions."""
    return torch.randn(leaves, 3, generator=torch.Generator().manual_seed(leaves)) * 1000.0


@pytest.mark.parametrize("leaves", [*range(1, 18), 37, 64, 100])
def test_sum_equals_the_recursion_in_any_order_of_addition(leaves):
    values = numbers(leaves)
    expected = written_out(0, leaves, 0.0, 1.0, values)
    assert expected is not None
    for order in (range(leaves), reversed(range(leaves)), torch.randperm(leaves).tolist()):
        tree = TreeSum(leaves)
        for leaf in order:
            tree.add(range(leaf, leaf + 1), [values[leaf].clone()])
        assert list(tree.sums) == [range(leaves)]
        assert torch.equal(tree.sums[range(leaves)][0], expected)


def test_sum_of_many_numbers_depends_on_the_order():
    """The test above would fail for the sum from left to right."""
    values = numbers(37)
    total = torch.zeros(3)
    for row in values:
        total = total + row
    assert not torch.equal(total, written_out(0, 37, 0.0, 1.0, values))


@pytest.mark.parametrize("ranks", range(1, 10))
def test_every_leaf_belongs_to_one_rank(ranks):
    for leaves in range(40):
        shares = [leaves_of(rank, ranks, leaves) for rank in range(ranks)]
        assert [leaf for share in shares for leaf in share] == list(range(leaves))
        assert max(map(len, shares)) == math.ceil(leaves / ranks)


@pytest.mark.parametrize("ranks", range(1, 10))
def test_nodes_of_the_ranks_are_consecutive_and_few(ranks):
    shares = ((leaves, rank, nodes) for leaves in range(70) for rank, nodes in enumerate(nodes_by_rank(ranks, leaves)))
    for leaves, rank, nodes in shares:
        share = leaves_of(rank, ranks, leaves)
        ends = [share.start, *(node.stop for node in nodes)]
        assert [range(*pair) for pair in pairwise(ends)] == nodes
        assert ends[-1] == share.stop or not share
        assert len(nodes) <= (1 if ranks & (ranks - 1) == 0 else 2 * math.ceil(math.log2(leaves + 1)))


def test_the_largest_number_of_sums_is_logarithmic():
    tree, largest = TreeSum(1000), 0
    for leaf in range(1000):
        tree.add(range(leaf, leaf + 1), [torch.ones(1)])
        largest = max(largest, len(tree.sums))
    assert largest <= 10


@pytest.mark.parametrize("ranks", [2, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_compute_the_sum_of_one_rank(ranks):
    cases = [(leaves, size) for leaves in (1, 2, 5, 6, 7, 12, 31) for size in (1, 5, 1000)]
    for of_rank in run_function(ranks, "tests.ranks.tree_ranks", "sums", cases=cases):
        for (leaves, size), result in zip(cases, of_rank, strict=True):
            values = torch.randn(leaves, size, generator=torch.Generator().manual_seed(leaves)) * 1000.0
            expected = written_out(0, leaves, 0.0, 1.0, values)
            assert expected is not None
            assert result == expected.tolist(), (leaves, size)
