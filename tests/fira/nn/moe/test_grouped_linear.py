"""The grouped linear layer: gradients, and rows that belong to no expert."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck
from torch.utils.flop_counter import FlopCounterMode

from fira.nn.moe.grouped_linear import RowGroups, _grouped_mm, _has_grouped_kernel, grouped_linear


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
    """Both implementations; the grouped kernel leaves such rows uninitialised, so that they must be cleared."""
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


@pytest.mark.parametrize(("inputs", "outputs"), [(614, 1228), (616, 1228), (614, 1232), (13, 5)])
def test_kernel_for_widths_whose_rows_are_no_multiple_of_16_bytes(inputs: int, outputs: int) -> None:
    """In bf16 against products in float64 of the same rounded values, with all gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((9, inputs), (3, outputs, inputs), (3, outputs), (9, outputs))
    x, weight, bias, grad = (torch.randn(s, generator=generator).to(torch.bfloat16) for s in shapes)
    groups = RowGroups(torch.tensor([3, 0, 4]), ragged=True)

    def run(product, dtype: torch.dtype) -> list[Tensor]:
        leaves = [value.to(dtype, copy=True).requires_grad_() for value in (x, weight, bias)]
        y = product(leaves[0], groups, *leaves[1:])
        return [y, *torch.autograd.grad(y, leaves, grad.to(dtype))]

    for low, exact in zip(run(_grouped_mm, torch.bfloat16), run(grouped_linear, torch.float64), strict=True):
        assert low.shape == exact.shape
        assert low.dtype == torch.bfloat16
        assert (low - exact).norm() < 0.01 * exact.norm()


class OnDevice:
    """Stands for a tensor on a GPU."""

    is_cuda, device = True, torch.device("cuda", 0)

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


@pytest.mark.parametrize(
    ("capability", "dtype", "expected"),
    [
        ((7, 5), torch.bfloat16, False),
        ((8, 0), torch.bfloat16, False),
        ((9, 0), torch.bfloat16, True),
        ((9, 0), torch.float16, False),
        ((9, 0), torch.float32, False),
        ((10, 0), torch.bfloat16, True),
        ((12, 0), torch.bfloat16, False),
    ],
)
def test_devices_with_the_kernel(monkeypatch, capability, dtype, expected) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert _has_grouped_kernel(OnDevice(dtype)) == expected
    monkeypatch.delattr(F, "grouped_mm")
    assert not _has_grouped_kernel(OnDevice(dtype))
    assert not _has_grouped_kernel(torch.zeros(1, dtype=dtype))


def test_sizes_are_read_once_for_all_products_of_a_layer(monkeypatch) -> None:
    """Without the kernel: two products, forward and backward, copy the sizes from the device once."""
    reads = []
    tolist = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda x: reads.append(x) or tolist(x))
    groups = RowGroups(torch.tensor([3, 0, 5]))
    weights = torch.randn(2, 3, 4, 4, requires_grad=True)
    x = torch.randn(8, 4, requires_grad=True)
    grouped_linear(grouped_linear(x, groups, weights[0]), groups, weights[1]).sum().backward()
    assert len(reads) == 1
