"""The differentiable all-to-all on several ranks, with uneven and empty splits."""

import pytest

from tests.launch import run_function


@pytest.mark.parametrize("sizes", [[[1, 2], [0, 3]], [[2, 0, 1], [3, 1, 0], [0, 4, 2]]])
def test_rows_and_gradients(sizes):
    ranks = range(len(sizes))
    results = run_function(len(sizes), "tests.ranks.all_to_all_ranks", "exchange", sizes=sizes)
    for rank, result in enumerate(results):
        assert result["received"] == [[source, rank, i] for source in ranks for i in range(sizes[source][rank])]
        assert result["grad"] == [[c * (1 + to) for c in (1, 2, 3)] for to in ranks for _ in range(sizes[rank][to])]


def test_a_second_differentiation_is_an_error():
    """Its gradients would be missing what passes through the exchange."""
    for message in run_function(2, "tests.ranks.all_to_all_ranks", "differentiate_twice"):
        assert "once_differentiable" in message
