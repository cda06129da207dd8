"""A linear layer with an adapter."""

import pytest
import torch
from torch import nn

from fira.nn.init import initialise
from fira.nn.lora import Lora
from fira.nn.lora_linear import LoraLinear


@pytest.mark.parametrize("bias", [False, True])
def test_linear_layer_with_adapter_multiplies_by_the_sum(bias: bool) -> None:
    torch.manual_seed(0)
    base = nn.Linear(5, 7, bias=bias).double().requires_grad_(False)
    layer = LoraLinear(base, Lora(3, 6.0, ("head",)))
    assert layer.weight is base.weight
    initialise(layer, "layers.0.q", 0)
    x = torch.randn(2, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias), rtol=0, atol=0)
    a, b = layer.lora_a.weight, layer.lora_b.weight
    assert (a.shape, b.shape) == ((3, 5), (7, 3))
    assert a.abs().max() <= 5**-0.5
    nn.init.normal_(b)
    dense = (layer.weight + 2 * b @ a).detach().requires_grad_()
    expected = nn.functional.linear(x, dense, layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-13, atol=1e-13)
    grad = torch.randn_like(expected)
    expected.backward(grad)
    layer(x).backward(grad)
    torch.testing.assert_close(a.grad, 2 * b.T @ dense.grad, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(b.grad, 2 * dense.grad @ a.T, rtol=1e-12, atol=1e-13)
    assert layer.weight.grad is None
