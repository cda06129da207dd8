"""Linear layers of several experts with quantised weights, one row at a time."""

import pytest
import torch

from fira.nn.moe.grouped_linear import RowGroups
from fira.nn.moe.quantized_experts import QuantizedExperts
from fira.nn.quantized_matrix import Int4Matrix, Int8Matrix


@pytest.mark.parametrize("form", [Int8Matrix, Int4Matrix])
@pytest.mark.parametrize("bias", [False, True])
def test_each_row_is_multiplied_by_the_matrix_of_its_expert(form: type, bias: bool) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(4, 9, 20), torch.randn(8, 20)
    added = torch.randn(4, 9) if bias else None
    experts = QuantizedExperts([form(w) for w in weight])
    y = experts(x, RowGroups(torch.tensor([3, 0, 1, 2]), ragged=True), added)
    for row, expert in enumerate([0, 0, 0, 2, 3, 3]):
        expected = form(weight[expert])(x[row : row + 1].to(torch.bfloat16))[0].float()
        torch.testing.assert_close(y[row], expected + added[expert] if bias else expected, rtol=0, atol=1e-6)
    assert not y[6:].any()
    one = experts(x[:1].expand(2, -1), RowGroups(None, {2: 1, 0: 1}), added)  # the experts of one token
    torch.testing.assert_close(one[1], y[0], rtol=0, atol=0)
