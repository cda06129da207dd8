"""The timeline of a predicted step has a row per rank, the reduction of its gradients, and the optimizer."""

import pytest

from fira.planner.candidate_costs import CandidateCosts, PlanInputs
from fira.planner.candidates import Candidate
from fira.planner.step_time import predict
from fira.planner.step_timeline import step_timeline
from pipeline.mesh import Layout
from pipeline.timeline import Phase


@pytest.fixture
def inputs(tiny, hardware, round_costs) -> PlanInputs:
    return PlanInputs(tiny, hardware, round_costs, "fp32")


def test_replicas_have_rows_and_the_optimizer_begins_after_the_last_reduction(inputs):
    estimate = predict(CandidateCosts(inputs, Candidate(Layout(2, 2, 1), "1f1b", 1, 2, 0)))
    timeline, phases, rows = step_timeline(estimate)
    assert rows == ["rank 0", "rank 1", "rank 2", "rank 3"]
    one = estimate.timeline.spans
    assert timeline.spans == (one[0], one[0], one[1], one[1])  # replicas of a stage have neighbouring ranks
    reductions, optimizer = phases[:4], phases[4:]
    assert [(phase.rank, phase.name) for phase in reductions] == [(rank, "gradient reduction") for rank in range(4)]
    assert [phase.start for phase in reductions] == [one[rank // 2][-1][2] for rank in range(4)]
    begin = max(phase.end for phase in reductions)
    end = begin + estimate.breakdown["optimizer"]
    assert optimizer == [Phase(rank, "optimizer", begin, end) for rank in range(4)]
    assert end == pytest.approx(estimate.seconds)


def test_one_replica_has_no_reduction(inputs):
    estimate = predict(CandidateCosts(inputs, Candidate(Layout(2, 1, 1), "1f1b", 1, 2, 0)))
    _, phases, _ = step_timeline(estimate)
    assert [phase.name for phase in phases] == ["optimizer"] * 2


def test_replicas_of_many_ranks_share_a_row(inputs):
    estimate = predict(CandidateCosts(inputs, Candidate(Layout(2, 2000, 1), "1f1b", 1, 2, 0)))
    timeline, phases, rows = step_timeline(estimate)
    assert rows == ["ranks 0–1,999", "ranks 2,000–3,999"]
    assert len(timeline.spans) == 2
    assert {phase.rank for phase in phases} == {0, 1}
