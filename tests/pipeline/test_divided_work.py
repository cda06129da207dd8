"""Division of computations over ranks by their costs. `tests/fira/optim/test_muon.py` runs it on two ranks."""

from pipeline.divided_work import divide


def test_one_rank_computes_everything():
    assert divide([3, 1, 2], 1) == [[0, 1, 2]]


def test_largest_costs_come_first():
    assert divide([1, 5, 3, 3], 2) == [[0, 1], [2, 3]]
    assert divide([7.0] * 5, 3) == [[0, 3], [1, 4], [2]]


def test_more_ranks_than_computations():
    assert divide([2], 3) == [[0], [], []]
    assert divide([], 2) == [[], []]
