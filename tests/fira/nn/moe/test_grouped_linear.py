"""The grouped linear layer: gradients, and rows that belong to no expert."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck
from torch.utils.flop_counter import FlopCounterMode

from fira.nn.moe.grouped_linear import RowGroups, _grouped_mm, _has_grouped_kernel, add_rows, grouped_linear
from tests.torch_versions import needs_grouped_mm


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


@needs_grouped_mm
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


@needs_grouped_mm
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


@needs_grouped_mm
@pytest.mark.parametrize(
    ("dtype", "widths", "padded"),
    [
        (torch.bfloat16, (614, 1228), (616, 1232)),
        (torch.bfloat16, (616, 1232), (616, 1232)),
        (torch.float32, (13, 5), (16, 8)),
        (torch.float32, (12, 8), (12, 8)),
    ],
)
def test_rows_are_padded_to_the_next_multiple_of_16_bytes(monkeypatch, dtype, widths, padded) -> None:
    seen, product = [], F.grouped_mm

    def grouped_mm(x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
        seen.append((x.shape[1], weight.shape[2]))
        return product(x, weight, offs=offs)

    monkeypatch.setattr(F, "grouped_mm", grouped_mm)
    inputs, outputs = widths
    y = _grouped_mm(
        torch.ones(3, inputs, dtype=dtype),
        RowGroups(torch.tensor([2, 1])),
        torch.ones(2, outputs, inputs, dtype=dtype),
        None,
    )
    assert y.shape == (3, outputs)
    assert seen == [padded]


class OnDevice:
    """Stands for a tensor on a GPU."""

    is_cuda, device = True, torch.device("cuda", 0)

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


@needs_grouped_mm
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


def loop(x: torch.Tensor, groups: list[tuple[int, int]], weight: torch.Tensor, bias: torch.Tensor | None):
    """The product, one row at a time. groups: (expert, rows) in order."""
    experts = [e for e, rows in groups for _ in range(rows)]
    rows = [weight[e] @ row + (0 if bias is None else bias[e]) for e, row in zip(experts, x, strict=False)]
    return torch.stack([*rows, *(0 * x[len(rows) :] @ weight[0].T)])


@settings(deadline=None)
@given(
    sizes=st.dictionaries(st.integers(0, 4), st.integers(0, 3), min_size=1),
    rest=st.integers(0, 2),
    biased=st.booleans(),
    seed=st.integers(0, 99),
)
def test_output_and_gradients_equal_a_loop_over_rows(sizes: dict[int, int], rest: int, biased: bool, seed: int) -> None:
    """For any order of the groups; `rest` rows belong to no expert, and some of the five experts have no rows."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(sum(sizes.values()) + rest, 3), (5, 2, 3), *([(5, 2)] if biased else [])]
    if not shapes[0][0]:
        return
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    x, weight, bias = inputs if biased else [*inputs, None]
    junk = [torch.full((n, m), 7.0, dtype=torch.float64) for n in range(1, 19) for m in (2, 3)]
    del junk  # uninitialised memory contains sevens
    y = grouped_linear(x, RowGroups(None, sizes), weight, bias)
    expected = loop(x, list(sizes.items()), weight, bias)
    torch.testing.assert_close(y, expected)
    grad_y = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    for ours, theirs in zip(
        torch.autograd.grad(y, inputs, grad_y),
        torch.autograd.grad(expected, inputs, grad_y, allow_unused=True, materialize_grads=True),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        assert torch.equal(grouped_linear(x, RowGroups(None, sizes), weight, bias), y)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("enabled", [True, False])
def test_autocast_computes_in_its_dtype(biased: bool, enabled: bool) -> None:
    """On a CPU also bfloat16 is computed per expert, so that counts of rows on the device are not needed."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(4, 3), torch.randn(3, 2, 3), torch.randn(3, 2) if biased else None
    groups = RowGroups(None, {2: 1, 0: 3})
    with torch.set_grad_enabled(enabled), torch.autocast("cpu", torch.bfloat16):
        y = grouped_linear(x, groups, weight, bias)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), loop(x, [(2, 1), (0, 3)], weight, bias), rtol=0.05, atol=0.05)


@needs_grouped_mm
@pytest.mark.parametrize("biased", [True, False])
def test_single_kernel_equals_a_loop_over_rows(biased: bool) -> None:
    """Without rows of no expert, the input is passed unchanged."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(8, 4), torch.randn(4, 8, 4), torch.randn(4, 8) if biased else None
    groups = RowGroups(torch.tensor([0, 3, 0, 5]))
    torch.testing.assert_close(_grouped_mm(x, groups, weight, bias), loop(x, [(1, 3), (3, 5)], weight, bias))
    assert groups.ends.dtype == torch.int32
    assert (groups.sizes, groups.ragged) == ({0: 0, 1: 3, 2: 0, 3: 5}, False)


@pytest.mark.parametrize("product", [grouped_linear, pytest.param(_grouped_mm, marks=needs_grouped_mm)])
def test_frozen_weights_have_no_gradient_and_cost_no_product(product) -> None:
    torch.manual_seed(0)
    groups = RowGroups(torch.tensor([3, 0, 5]))
    x = torch.randn(8, 4, requires_grad=True)
    weight, bias = torch.randn(3, 6, 4), torch.randn(3, 6)
    y = product(x, groups, weight, bias)
    with FlopCounterMode(display=False) as flops:
        y.backward(torch.ones_like(y))
    assert x.grad is not None
    if product is grouped_linear:
        assert flops.get_total_flops() == 2 * 8 * 4 * 6
    assert not product(x.detach(), groups, weight, bias).requires_grad


def test_backward_reads_the_parameter_instead_of_the_memory_of_the_forward_pass() -> None:
    """ZeRO 3 frees the weights in between, and gathers them again for the backward pass."""
    torch.manual_seed(0)
    x = torch.randn(8, 4, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(3, 6, 4))
    y = grouped_linear(x, RowGroups(torch.tensor([3, 0, 5])), weight)
    expected = weight.detach()[[0, 0, 0, 2, 2, 2, 2, 2]].sum(1)
    weight.data = 2 * weight.data
    y.backward(torch.ones_like(y))
    torch.testing.assert_close(x.grad, 2 * expected)


def test_sum_of_two_products_keeps_the_padded_rows() -> None:
    torch.manual_seed(0)
    groups = RowGroups(torch.tensor([3, 0, 5]))
    x = torch.randn(8, 4, dtype=torch.float64, requires_grad=True)
    weights = [torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    y, z = (grouped_linear(x, groups, weight) for weight in weights)
    stride, expected = y.stride(), (y + z).detach()
    assert stride == (16, 1)
    total = add_rows(y, z)
    assert torch.equal(total, expected)
    assert total.stride() == stride
    assert gradcheck(
        lambda x, v, w: add_rows(grouped_linear(x, groups, v), grouped_linear(x, groups, w)), (x, *weights)
    )
