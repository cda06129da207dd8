"""Linear layers with a quantised weight."""

import pytest
import torch
from torch import nn

from fira.nn.quantized_linear import QuantizedHead, QuantizedLinear
from fira.nn.quantized_matrix import Int4Matrix, Int8Matrix


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_adds_the_bias_in_the_precision_of_its_input(bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    base = nn.Linear(40, 24, bias=bias).to(dtype)
    layer = QuantizedLinear(base, Int4Matrix(base.weight))
    weight = layer.matrix(torch.eye(40, dtype=torch.bfloat16)).T.double()
    x = torch.randn(2, 3, 40).to(dtype)
    y = layer(x)
    assert (y.dtype, y.shape, layer.in_features, layer.out_features) == (dtype, (2, 3, 24), 40, 24)
    expected = x.double() @ weight.T + (base.bias.double() if bias else 0)
    torch.testing.assert_close(y.double(), expected, rtol=0.02, atol=0.01)
    torch.testing.assert_close(layer(x.transpose(0, 1)), y.transpose(0, 1), rtol=0, atol=0)  # not contiguous


def test_weight_of_the_head_is_that_of_its_product() -> None:
    torch.manual_seed(0)
    base = nn.Linear(12, 37, bias=False)
    head = QuantizedHead(base, Int8Matrix(base.weight))
    assert head.weight.shape == (37, 12)
    torch.testing.assert_close(head(torch.eye(12)).T, head.weight, rtol=2**-8, atol=0)
    assert 0 < (head.weight - base.weight).abs().max() < base.weight.abs().max() / 200
