"""Links between ranks: which pairs are measured, on two ranks, and the table."""

import torch

from fira.doctor.links import ALL_PAIRS, SHOWN, PairLink, describe_links, measure_links, pairs_of
from pipeline.mpi import init
from tests.launch import run_function

CPU = torch.device("cpu")


def measured() -> list[list[float]]:
    links, backend = measure_links(init(), CPU)
    assert backend == "mpi"
    return [[*link.ranks, link.latency, link.bandwidth] for link in links]


def test_three_ranks_measure_every_pair_and_all_get_the_result():
    by_rank = run_function(3, __name__, "measured")
    assert by_rank[0] == by_rank[1] == by_rank[2]
    assert [(int(a), int(b)) for a, b, _, _ in by_rank[0]] == [(0, 1), (0, 2), (1, 2)]
    for _, _, latency, bandwidth in by_rank[0]:
        assert 1e-7 < latency < 0.2
        assert 1e6 < bandwidth < 1e12


def test_pairs_of_a_few_ranks_are_measured_one_after_another():
    rounds = pairs_of(4)
    assert sorted(pair for pairs in rounds for pair in pairs) == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    assert all(len(pairs) == 1 for pairs in rounds)


def test_many_ranks_measure_their_neighbours_in_two_rounds():
    rounds = pairs_of(101)
    assert len(rounds) == 2
    assert sorted(pair for pairs in rounds for pair in pairs) == [(rank, rank + 1) for rank in range(100)]
    for pairs in rounds:
        ranks = [rank for pair in pairs for rank in pair]
        assert len(ranks) == len(set(ranks))


def test_table():
    text = describe_links([PairLink((0, 1), 42e-6, 3.25e9)], 2, CPU, "mpi")
    title, _, row = text.splitlines()
    assert title == "links between ranks: cpu tensors over mpi"
    assert row.split() == ["0", "–", "1", "42", "µs", "3.25", "GB/s"]


def test_table_of_many_ranks_shows_the_slowest_links():
    links = [PairLink((rank, rank + 1), 1e-6, (rank + 1) * 1e9) for rank in range(ALL_PAIRS + 12)]
    title, _, *rows = describe_links(links[::-1], ALL_PAIRS + 13, CPU, "mpi").splitlines()
    assert title.endswith(f"the {SHOWN} slowest of 20 neighbours, median 10.50 GB/s")
    assert [int(row.split()[0]) for row in rows] == list(range(SHOWN))
