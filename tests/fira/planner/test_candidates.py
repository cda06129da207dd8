"""Enumeration of candidates."""

from fira.planner.candidates import Candidate, Constraints, candidates
from pipeline.mesh import Layout
from pipeline.schedule import SCHEDULES


def test_candidates_equal_brute_force(tiny):
    result = {
        (c.layout.pp, c.layout.dp, c.layout.ep, c.schedule, c.microbatch) for c in candidates(tiny, 4, Constraints(8))
    }
    expected = set()
    for pp in range(1, 5):
        for dp in range(1, 5):
            for ep in range(1, 5):
                for name in SCHEDULES if pp > 1 else ["1f1b"]:
                    stages = pp * (2 if name in ("interleaved", "zb-v", "dualpipev") else 1)
                    if pp * dp == 4 and dp % ep == 0 and 4 % ep == 0 and stages <= 6:
                        expected |= {(pp, dp, ep, name, m) for m in (1, 2, 4, 8) if m <= 8 // dp}
    assert result == expected


def test_constraints_are_satisfied(tiny):
    constraints = Constraints(10, pp=2, dp=2, ep=1, schedule="zb-h1", microbatch=3, recompute=2)
    assert list(candidates(tiny, 4, constraints)) == [Candidate(Layout(2, 2, 1), "zb-h1", 3, 2, 2)]


def test_all_sequences_of_a_replica_are_a_microbatch_size(tiny):
    sizes = [c.microbatch for c in candidates(tiny, 2, Constraints(11, pp=1, ep=1))]
    assert sizes == [1, 2, 4, 6]


def test_layout_with_more_replicas_than_sequences_is_left_out(tiny):
    assert {c.layout.dp for c in candidates(tiny, 4, Constraints(2))} == {1, 2}
