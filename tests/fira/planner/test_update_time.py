"""The time of the update with AdamW and with Muon."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from fira.planner.candidate_costs import CandidateCosts, PlanInputs
from fira.planner.candidates import Candidate
from fira.planner.costs import LayerCost
from fira.planner.update_time import update_seconds
from pipeline.mesh import Layout

D, FF = 128, 256  # of fira-tiny: a block has four matrices [D, D], and for each of 4 experts [FF, D] and [D, FF]


@pytest.fixture(scope="module")
def cost_model() -> Callable[[int], list[LayerCost]]:
    """Cost model of embedding, block and head: a block's matrices take 8 ms."""
    return lambda _: [LayerCost(0, 0, 0, 0, 1e-3, orthogonalize=seconds) for seconds in (0, 8e-3, 0)]


def update_of(profile, hardware, cost_model, layout, shard=None):
    inputs = PlanInputs(profile, hardware, cost_model, "fp32")
    return update_seconds(CandidateCosts(inputs, Candidate(layout, "1f1b", 1, 2, 0, shard)))


def test_update_counts_the_shard_of_the_experts(tiny, hardware, round_costs):
    kind = tiny.kinds[1]
    share = (kind.parameters + kind.expert_parameters / 2) / (kind.parameters + kind.expert_parameters)
    assert update_of(tiny, hardware, round_costs, Layout()) == pytest.approx(6e-3)
    sharded = update_of(tiny, hardware, round_costs, Layout(1, 2, 2))
    assert sharded == pytest.approx(2e-3 + 4 * share * 1e-3 + 2 * 1e-5)


@pytest.mark.parametrize("layout", [Layout(), Layout(1, 2, 1), Layout(1, 2, 2), Layout(2, 2, 1)])
@pytest.mark.parametrize("shard", [None, "optimizer", "parameters"])
def test_replicas_divide_the_orthogonalisation(muon, tiny, hardware, cost_model, layout, shard):
    """Each of two stages has up to three blocks. The results are shared like half of the gradients."""
    added = update_of(muon, hardware, cost_model, layout, shard) - update_of(tiny, hardware, cost_model, layout, shard)
    blocks = 3 if layout.pp == 2 else 4
    groups = [4 * D * D, 4 * 2 * D * FF][: 1 if layout.ep == 2 else 2]  # which two ranks hold
    gather = sum(1e-5 + 4 * blocks * elements / 2 / 1e10 for elements in groups)
    assert added == pytest.approx(blocks * 8e-3 / layout.dp + (gather if layout.dp == 2 and shard is None else 0.0))


@pytest.mark.parametrize("ep", [1, 2])
def test_a_gpu_orthogonalises_the_matrices_of_all_experts_at_once(muon, tiny, hardware, cost_model, ep):
    gpu, layout = replace(hardware, overlaps_collectives=True), Layout(1, 64, ep)
    added, on_cpu = (
        update_of(muon, device, cost_model, layout, "optimizer")
        - update_of(tiny, device, cost_model, layout, "optimizer")
        for device in (gpu, hardware)
    )
    matrix, expert = 4 * D**3 + 2 * D**3, 4 * D * D * FF + 2 * D**3
    assert added == pytest.approx(8e-3 * 4 * expert / ep / (4 * matrix + 8 * expert))
    assert on_cpu == pytest.approx(4 * 8e-3 / 64)
