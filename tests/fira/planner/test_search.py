"""The search against an exhaustive one."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fira.errors import UserError
from fira.planner.candidate_costs import CandidateCosts, PlanInputs
from fira.planner.candidates import Constraints, candidates
from fira.planner.costs import LayerCost
from fira.planner.device_specs import Link
from fira.planner.memory import rank_memory, with_least_recompute
from fira.planner.search import search
from fira.planner.step_time import least_seconds, predict
from fira.planner.tensor_memory import LayerMemory


@settings(max_examples=5, deadline=None)
@given(
    flops=st.sampled_from([1e11, 1e12, 1e13]),
    memory=st.sampled_from([2e7, 4e7, 6e7, 1e9]),
    bandwidth=st.sampled_from([1e8, 1e10]),
    overlaps=st.booleans(),
)
def test_search_equals_exhaustive_search(tiny, hardware, flops, memory, bandwidth, overlaps):
    inside = dict.fromkeys(hardware.inside, Link(1e-5, bandwidth))
    hardware = replace(hardware, memory=memory, inside=inside, overlaps_collectives=overlaps)

    def cost_model(microbatch: int) -> list[LayerCost]:
        seconds = [kind.layer.flops_per_token(128) * microbatch * 128 / flops + 1e-4 for kind in tiny.kinds]
        return [LayerCost(s, s, s, 2 * s, 1e-4, memory=LayerMemory(2e6 * microbatch)) for s in seconds]

    inputs = PlanInputs(tiny, hardware, cost_model, "fp32")
    every = [CandidateCosts(inputs, candidate) for candidate in candidates(tiny, 4, Constraints(16))]
    for shard in ("optimizer", "parameters"):
        every = [c if max(rank_memory(c)) <= memory or c.layout.dp == 1 else c.with_sharding(shard) for c in every]
    every = [c if max(rank_memory(c)) <= memory else with_least_recompute(c) for c in every]
    assert all(least_seconds(c) <= predict(c).seconds * (1 + 1e-9) for c in every)
    fitting = sorted(predict(c).seconds for c in every if max(rank_memory(c)) <= memory)
    best = search(inputs, 4, Constraints(16), limit=5).best
    assert [estimate.seconds for estimate in best] == pytest.approx(fitting[:5])


def test_sharding_is_chosen_unless_it_is_excluded(tiny, hardware):
    def cost_model(microbatch: int) -> list[LayerCost]:
        return [LayerCost(1e-3, 1e-3, 1e-3, 2e-3, 1e-4, memory=LayerMemory(0.0)) for _ in tiny.kinds]

    inputs = PlanInputs(tiny, hardware, cost_model, "fp32")
    fixed = Constraints(16, pp=1, ep=1, recompute=0)
    whole = [CandidateCosts(inputs, candidate) for candidate in candidates(tiny, 4, fixed)]
    least = min(max(rank_memory(costs)) for costs in whole)
    inputs = PlanInputs(tiny, replace(hardware, memory=least - 1), cost_model, "fp32")
    assert {estimate.candidate.shard for estimate in search(inputs, 4, fixed, limit=5).best} == {"optimizer"}
    with pytest.raises(UserError, match="the model does not fit"):
        search(inputs, 4, replace(fixed, shard="none"), limit=5)
