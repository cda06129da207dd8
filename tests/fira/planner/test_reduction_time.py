"""The part of the gradient reduction that is visible after a rank's last action."""

from dataclasses import replace
from itertools import pairwise

import pytest

from fira.planner.candidate_costs import CandidateCosts, PlanInputs
from fira.planner.candidates import Candidate, schedule_of
from fira.planner.device_specs import Link
from fira.planner.reduction_time import visible_reduction
from fira.planner.step_time import predict
from pipeline.mesh import Layout
from pipeline.schedule import SCHEDULES
from pipeline.simulate import simulate


def costs_of(profile, hardware, cost_model, layout, schedule="1f1b", recompute=0, bandwidth=1e9):
    hardware = replace(
        hardware,
        ranks_per_node=layout.world,
        inside=dict.fromkeys(hardware.inside, Link(1e-4, bandwidth)),
        overlaps_collectives=True,
    )
    inputs = PlanInputs(profile, hardware, cost_model, "fp32")
    return CandidateCosts(inputs, Candidate(layout, schedule, 1, 4, recompute))


def sums_over_two(profile, bandwidth):
    """ms to sum the gradients of each layer over two ranks: two messages of the whole gradient in two halves."""
    kinds = [profile.kinds[kind] for kind in profile.layers]
    parts = [[k.parameters, k.expert_parameters] for k in kinds]
    return [sum(2e-1 + 4 * n / bandwidth * 1e3 for n in part if n) for part in parts]


def queue_end(ready, seconds):
    """When a link has sent everything in order, starting each item when it is ready: by the longest busy period."""
    return max(ready[first] + sum(seconds[first:]) for first in range(len(ready)))


@pytest.mark.parametrize("bandwidth", [1e7, 1e8, 1e9])  # most, some and little of the reduction is visible
def test_full_backward_by_hand(tiny, hardware, round_costs, bandwidth):
    """The backward takes 4 ms for the head, 7 for each block and 1 for the embedding."""
    profile = replace(tiny, tied=False)
    costs = costs_of(profile, hardware, round_costs, Layout(1, 2, 1), bandwidth=bandwidth)
    expected = queue_end([-29, -22, -15, -8, -1, 0], sums_over_two(profile, bandwidth)[::-1])
    assert visible_reduction(costs, 0) == pytest.approx(expected * 1e-3)
    assert costs.reduction(0) > visible_reduction(costs, 0)
    assert predict(costs).breakdown["reduce"] == pytest.approx(expected * 1e-3)


def test_after_the_backward_without_overlap(tiny, hardware, round_costs):
    costs = costs_of(tiny, hardware, round_costs, Layout(1, 2, 1))
    costs.hardware = replace(costs.hardware, overlaps_collectives=False)
    assert visible_reduction(costs, 0) == costs.reduction(0)
    assert predict(costs).breakdown["reduce"] == pytest.approx(costs.reduction(0))


def test_weight_gradients_and_recomputed_blocks(tiny, hardware, round_costs):
    """Rank 1 of zb-h1 holds a block and the head. The backward of a recomputed block ends before the second half."""
    seconds = sums_over_two(tiny, 1e8)[:3:-1]
    for recompute, ready in ((0, [-3, 0]), (1, [0, 0])):
        profile = replace(tiny, tied=False)
        costs = costs_of(profile, hardware, round_costs, Layout(2, 2, 1), "zb-h1", recompute, bandwidth=1e8)
        assert costs.stages == [range(4), range(4, 6)]
        assert visible_reduction(costs, 1) == pytest.approx(queue_end(ready, seconds) * 1e-3)


def test_table_of_a_tied_embedding_is_last(tiny, hardware, round_costs):
    """The head's copy is not reduced."""
    table = tiny.kinds[0].largest
    sizes = sums_over_two(replace(tiny, tied=False), 1e8)
    for layer in (0, 5):
        sizes[layer] -= 4 * table / 1e8 * 1e3
    costs = costs_of(replace(tiny, tied=True), hardware, round_costs, Layout(1, 2, 1), bandwidth=1e8)
    end = queue_end([-29, -22, -15, -8, -1, 0], sizes[::-1])
    assert visible_reduction(costs, 0) == pytest.approx((end + 0.2 + 4 * table / 1e8 * 1e3) * 1e-3)


@pytest.mark.parametrize("name", SCHEDULES)
def test_stages_of_a_rank_are_reduced_in_the_order_of_their_ends(tiny, hardware, round_costs, name):
    """Every layer by itself, from the simulated end of its stage's last action."""
    profile = replace(tiny, tied=False)
    costs = costs_of(profile, hardware, round_costs, Layout(2, 2, 2), name, bandwidth=1e8)
    timeline = simulate(schedule_of(name, 2, 4), costs.actions, costs.transfer)
    for rank, spans in enumerate(timeline.spans):
        ready = []
        for stage in costs.rank_stages[rank]:
            left = max(end for action, _, end in spans if action.stage == stage) - spans[-1][2]
            for layer in costs.stages[stage]:
                ready.append((left * 1e3, layer))
                left -= costs.layer_actions[layer]["W" if costs.splits_backward else "B"]
        order = sorted(ready, key=lambda item: (item[0], -item[1]))
        expected = queue_end([at for at, _ in order], [costs.layer_reduction(layer) * 1e3 for _, layer in order])
        assert visible_reduction(costs, rank, spans) == pytest.approx(expected * 1e-3)
        assert visible_reduction(costs, rank) <= visible_reduction(costs, rank, spans) * (1 + 1e-9)


def test_faster_links_never_leave_more_visible(tiny, hardware, round_costs):
    visible = [
        visible_reduction(costs_of(tiny, hardware, round_costs, Layout(1, 2, 1), bandwidth=10.0**n), 0)
        for n in range(6, 12)
    ]
    assert all(slower > faster for slower, faster in pairwise(visible))
