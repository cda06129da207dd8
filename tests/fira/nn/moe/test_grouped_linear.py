"""The grouped linear layer: gradients, and rows that belong to no expert."""

import torch
from torch.autograd import gradcheck
from torch.utils.flop_counter import FlopCounterMode

from fira.nn.moe.grouped_linear import RowGroups, _grouped_mm, grouped_linear


def test_input_and_weight_gradients_are_computed_separately() -> None:
    torch.manual_seed(0)
    groups = RowGroups(torch.tensor([3, 0, 5]))
    x = torch.randn(8, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 6, 4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda *inputs: grouped_linear(inputs[0], groups, *inputs[1:]), (x, weight, bias))
    y = grouped_linear(x, groups, weight, bias)
    for wanted in ([x], [weight, bias]):
        with FlopCounterMode(display=False) as flops:
            torch.autograd.grad(y, wanted, torch.ones_like(y), retain_graph=True)
        assert flops.get_total_flops() == 2 * 8 * 4 * 6


def test_rows_without_expert_have_zero_output_and_gradient() -> None:
    """By a product for each expert, and by the kernel for all, which leaves what it likes in such rows."""
    counts, weight, bias = torch.tensor([3, 0, 2]), torch.randn(3, 8, 4), torch.randn(3, 8)
    results = []
    for product in (grouped_linear, _grouped_mm):
        x = torch.randn(9, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
        y = product(x, RowGroups(counts, ragged=True), weight, bias)
        results.append((y.detach(), *torch.autograd.grad(y, x, torch.ones_like(y))))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
        assert one[:5].abs().min() > 0
        assert not one[5:].any()
