"""A linear layer whose product with one row is a batched product."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fira.nn.row_linear import RowLinear


@pytest.mark.parametrize("outputs", [2, 31, 64])
@pytest.mark.parametrize("shape", [(1, 1, 17), (1, 17), (17,), (2, 3, 17)])
def test_product_equals_that_of_a_linear_layer(shape: tuple[int, ...], outputs: int) -> None:
    torch.manual_seed(0)
    base = nn.Linear(17, outputs, bias=False)
    layer, x = RowLinear(base), torch.randn(shape)
    assert layer.weight is base.weight
    expected = F.linear(x.double(), base.weight.double())
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-6, atol=1e-6)
    assert layer.double()(x.double()).dtype == torch.float64
