"""The roofline estimate of layers' costs."""

from dataclasses import replace

import pytest

from fira.planner.costs import roofline_costs
from fira.planner.model_profile import saved_bytes


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
    saved, for_weight_grad = saved_bytes(tiny, 1, 3)
    assert (block.saved_for_backward, block.saved_for_weight_grad) == (saved, for_weight_grad)
    assert block.forward == block.backward_input == pytest.approx((weights + 2 * saved) / 1e11)
    assert block.backward_weight == pytest.approx((2 * weights + saved) / 1e11)
    assert block.optimizer == pytest.approx(10 * weights / 1e11)


def test_head_computes_both_gradients_in_its_forward(tiny, hardware):
    fast_memory = replace(hardware, memory_bandwidth=1e30, seconds_per_layer=1e-6)
    head = roofline_costs(tiny, fast_memory, "fp32")(1)[2]
    assert head.forward == pytest.approx(3 * 128 * tiny.flops[-1] / 1e12)
    assert head.backward_input == head.backward_weight == 1e-6
    assert head.workspace > 0
