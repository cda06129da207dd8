"""Fused gated activation against the plain form."""

import pytest
import torch
import torch.nn.functional as F

from fira.nn.mlp import gated


@pytest.mark.parametrize("activation", [F.silu, F.gelu])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.bfloat16, 5e-2), (torch.float16, 5e-3)])
def test_two_tensors_and_two_halves(compare, activation, dtype, tolerance) -> None:
    torch.manual_seed(0)
    for shape in ((5, 37), (2, 3, 8), (3, 1030), (0, 8)):
        gate, a = ((3 * torch.randn(shape)).to(dtype) for _ in range(2))
        for inputs in ((gate, a), (torch.cat([gate, a], -1),)):
            launches = compare(lambda *x: gated(activation, *x), *inputs, rtol=tolerance, atol=tolerance)
            assert launches == ["_gated", "_gated_backward"] * bool(len(gate))


def test_other_activations_use_the_plain_form(compare) -> None:
    assert compare(lambda x: gated(torch.tanh, x), torch.randn(5, 8)) == []
