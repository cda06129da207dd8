"""The roofline estimate of layers' costs."""

from dataclasses import replace

import pytest

from fira.planner.costs import roofline_costs
from fira.planner.model_profile import layer_memory


def test_costs_limited_by_flops(tiny, hardware):
    fast_memory = replace(hardware, memory_bandwidth=1e30, seconds_per_layer=0.0)
    block = roofline_costs(tiny, fast_memory, "fp32")(3)[1]
    tokens, weights = 3 * 128, tiny.kinds[1].layer.flops_per_token(0)
    scores = tiny.flops[1] - weights
    assert block.forward == pytest.approx(tokens * tiny.flops[1] / 1e12)
    assert block.backward_input == pytest.approx(tokens * (weights + 2 * scores) / 1e12)
    assert block.backward_weight == pytest.approx(tokens * weights / 1e12)
    assert block.backward == block.backward_input + block.backward_weight


def test_costs_limited_by_memory_bandwidth(tiny, hardware):
    fast_compute = replace(hardware, flops={"fp32": 1e30}, seconds_per_layer=0.0)
    block = roofline_costs(tiny, fast_compute, "fp32")(3)[1]
    weights = 4 * (tiny.kinds[1].parameters + tiny.kinds[1].expert_parameters)
    memory = layer_memory(tiny, 1, 3)
    assert block.memory.saved == pytest.approx(memory.saved, rel=1e-3)  # from one and two sequences
    assert block.memory.forward == pytest.approx(memory.forward, rel=1e-3)
    saved = block.memory.saved + 4 * 3 * 128 * 128  # with the input
    assert block.forward == block.backward_input == pytest.approx((weights + 2 * saved) / 1e11)
    assert block.backward_weight == pytest.approx((2 * weights + saved) / 1e11)
    assert block.optimizer == pytest.approx(10 * weights / 1e11)


@pytest.mark.parametrize(("precision", "rate"), [("fp32", 1e12), ("bf16", 8e12), ("fp16", 1e12)])
def test_time_of_muon_is_that_of_its_products(muon, tiny, hardware, precision, rate):
    """Five times three products of a matrix [m, n], m ≤ n: two with m² n and one with m³ multiply-adds."""
    fast_starts = replace(hardware, flops={"fp32": 1e12, "bf16": 8e12, "fp16": 8e12}, seconds_per_layer=1e-9)
    attention, experts = 4 * 6 * 128**3, 2 * 4 * (4 * 128**2 * 256 + 2 * 128**3)
    embedding, block, head = roofline_costs(muon, fast_starts, precision)(1)
    assert block.orthogonalize == pytest.approx(5 * (attention + experts) / rate)
    assert embedding.orthogonalize == head.orthogonalize == 0
    without = roofline_costs(tiny, fast_starts, precision)(1)[1]
    assert replace(block, orthogonalize=0) == without
    slow_starts = replace(hardware, seconds_per_layer=1.0)
    assert roofline_costs(muon, slow_starts, "fp32")(1)[1].orthogonalize == 4 + 2  # an expert's two matrices at once


def test_head_computes_both_gradients_in_its_forward(tiny, hardware):
    fast_memory = replace(hardware, memory_bandwidth=1e30, seconds_per_layer=1e-6)
    head = roofline_costs(tiny, fast_memory, "fp32")(1)[2]
    assert head.forward == pytest.approx(3 * 128 * tiny.flops[-1] / 1e12)
    assert head.backward_input == head.backward_weight == 1e-6
