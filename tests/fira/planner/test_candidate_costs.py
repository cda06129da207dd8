"""Durations of one candidate's messages, reductions and actions."""

from dataclasses import replace

import pytest

from fira.planner.candidate_costs import CandidateCosts, PlanInputs
from fira.planner.candidates import Candidate
from fira.planner.device_specs import Link
from pipeline.mesh import Layout
from pipeline.schedule import ActionKind

BOUNDARY = 128 * 128 * 4  # bytes of one sequence between stages


def costs_of(profile, hardware, cost_model, layout, schedule="1f1b", recompute=0):
    inputs = PlanInputs(profile, hardware, cost_model, "fp32")
    return CandidateCosts(inputs, Candidate(layout, schedule, 1, 2, recompute))


def test_stages_and_layers_of_ranks(tiny, hardware, round_costs):
    costs = costs_of(tiny, hardware, round_costs, Layout(2, 1, 1), "zb-v")
    assert costs.placement == (0, 1, 1, 0)
    assert costs.rank_stages == [[0, 3], [1, 2]]
    assert costs.rank_layers[0] == [*costs.stages[0], *costs.stages[3]]
    assert costs.boundary == BOUNDARY
    assert costs.transfer == 1e-5 + BOUNDARY / 1e10


def test_action_durations_with_recompute(tiny, hardware, round_costs):
    costs = costs_of(tiny, hardware, round_costs, Layout(2, 1, 1), "zb-h1", recompute=1)
    assert costs.stages == [range(4), range(4, 6)]
    assert [costs.recomputed(stage) for stage in range(2)] == [[1], [4]]
    ms = {kind: [seconds * 1e3 for seconds in costs.actions[kind]] for kind in ActionKind}
    assert ms[ActionKind.FORWARD] == pytest.approx([13, 6])
    assert ms[ActionKind.BACKWARD] == pytest.approx([22 + 4, 11 + 4])
    assert ms[ActionKind.BACKWARD_INPUT] == pytest.approx([0, 4 + 7 + 2])
    assert ms[ActionKind.BACKWARD_WEIGHT] == pytest.approx([26, 2])
    assert [seconds * 1e3 for seconds in costs.work] == pytest.approx([39, 21])


def test_exchange_with_experts_on_two_ranks(tiny, hardware, round_costs):
    assert costs_of(tiny, hardware, round_costs, Layout(1, 2, 1)).exchange == [(0, 0)] * 6
    embedding, *blocks, head = costs_of(tiny, hardware, round_costs, Layout(1, 2, 2)).exchange
    one_way = 1e-5 + BOUNDARY * tiny.config.top_k / 2 / 1e10
    assert embedding == head == (0, 0)
    for block in blocks:
        assert block == pytest.approx((1e-5 + 2 * one_way, 2 * one_way))


@pytest.mark.parametrize(("schedule", "backward"), [("1f1b", 7e-3), ("zb-h1", 4e-3)])
@pytest.mark.parametrize("bandwidth", [1e9, 1e6])
def test_exchange_of_half_of_the_experts_between_nodes(tiny, hardware, round_costs, schedule, backward, bandwidth):
    """The time of a layer less that of its products, from the ends of all operations. round_costs: 4 ms forward."""
    link = Link(1e-4, bandwidth)
    between = replace(hardware, ranks_per_node=1, between={**hardware.between, "all_to_all": link})
    costs = costs_of(tiny, replace(between, overlaps_collectives=True), round_costs, Layout(1, 2, 2), schedule)
    config = tiny.config
    expert = 2 * config.d_model * config.d_ff + config.d_ff + config.d_model  # with biases
    share = 2 * config.top_k * expert / tiny.flops[1]
    half = 1e-4 + BOUNDARY * config.top_k / 2 / 2 / bandwidth

    def added(products: float) -> float:
        arrival = [half, 2 * half]
        computed = [arrival[0] + products / 2]
        computed.append(max(computed[0], arrival[1]) + products / 2)
        returned = max(computed[0], arrival[1]) + half
        return max(returned, computed[1]) + half - products

    expected = 1e-4 + added(share * 4e-3), added(share * backward)
    assert costs.exchange[1] == pytest.approx(expected)
    in_line = costs_of(tiny, between, round_costs, Layout(1, 2, 2), schedule).exchange[1]
    one_way = 1e-4 + BOUNDARY * config.top_k / 2 / bandwidth
    assert in_line == pytest.approx((1e-4 + 2 * one_way, 2 * one_way))


def test_reduction_over_replicas_and_tied_embedding(tiny, hardware, round_costs):
    bytes_ = [4 * sum(k.parameters for k in tiny.kinds), 4 * tiny.kinds[1].expert_parameters]
    profile = replace(tiny, layers=[0, 1, 2], flops=[tiny.flops[0], tiny.flops[1], tiny.flops[-1]], tied=False)
    # All ranks reduce in a group of four over two nodes, experts in groups of two ranks that are two apart.
    costs = costs_of(profile, hardware, round_costs, Layout(1, 4, 2))
    expected = 4 * 1e-4 + 2 * 3 / 4 * bytes_[0] / 1e9 + 2 * 1e-4 + 2 * 1 / 2 * bytes_[1] / 2 / 1e9
    assert costs.reduction(0) == pytest.approx(expected)
    tied = replace(profile, tied=True)
    assert costs.parameters(0)[0] - costs_of(tied, hardware, round_costs, Layout()).parameters(0)[0] == (
        tiny.kinds[0].largest
    )
    pipeline = costs_of(tied, hardware, round_costs, Layout(2, 1, 1))
    assert pipeline.reduction(0) == pytest.approx(2 * (1e-5 + 4 * tiny.kinds[0].largest / 1e10))
    assert pipeline.reduction(1) == 0
