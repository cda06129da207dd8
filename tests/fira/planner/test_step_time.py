"""Estimates of the step time."""

import math
from dataclasses import replace

import pytest

from fira.planner.candidate_costs import CandidateCosts, PlanInputs
from fira.planner.candidates import Candidate
from fira.planner.device_specs import Link
from fira.planner.memory import rank_memory
from fira.planner.step_time import least_seconds, predict
from pipeline.mesh import Layout


@pytest.fixture(scope="module")
def inputs(tiny, hardware, round_costs) -> PlanInputs:
    free_links = replace(hardware, inside=dict.fromkeys(hardware.inside, Link(0, math.inf)))
    return PlanInputs(tiny, free_links, round_costs, "fp32")


def test_step_by_hand(tiny, inputs):
    """Two ranks, two micro-batches, 1F1B: stages of embedding and three blocks, and of a block and the head.

    In ms: F 13 and 6, B 22 and 11. Rank 1 is busy from 13 to 47, rank 0 has B0 from 30 to 52 and B1 to 74; four layers
    are updated.
    """
    costs = CandidateCosts(inputs, Candidate(Layout(2, 1, 1), "1f1b", 1, 2, 0))
    assert costs.stages == [range(4), range(4, 6)]
    result = predict(costs)
    assert result.seconds == pytest.approx(78e-3)
    assert result.breakdown == pytest.approx(
        {"compute": 52e-3, "uneven": 18e-3, "fill": 4e-3, "optimizer": 4e-3, "exchange": 0, "reduce": 0}
    )
    assert result.bubble == pytest.approx(22 / 78)
    assert result.bottleneck == "uneven"
    assert least_seconds(costs) <= result.seconds
    assert result.memory == rank_memory(costs)


def test_one_rank_computes_only(inputs):
    result = predict(CandidateCosts(inputs, Candidate(Layout(), "1f1b", 1, 3, 0)))
    assert result.seconds == pytest.approx(3 * (19 + 33) * 1e-3 + 6e-3)
    assert result.bottleneck == "compute"


def test_further_microbatches_continue_at_the_pace_of_the_slowest_rank(inputs, monkeypatch):
    costs = CandidateCosts(inputs, Candidate(Layout(2, 1, 1), "1f1b", 1, 40, 0))
    exact = predict(costs).seconds
    monkeypatch.setattr("fira.planner.step_time.MAX_FORWARDS", 2)
    assert len(predict(costs).timeline.spans[0]) == 2 * 8
    assert predict(costs).seconds == pytest.approx(exact)
