"""Fused bias, GELU and dropout of experts against the plain forms."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fira.nn.dropout import token_keys
from fira.nn.moe.experts import Experts
from fira.nn.moe.grouped_linear import RowGroups, _add_bias, _grouped_mm
from tests.torch_versions import needs_grouped_mm

COUNTS = [3, 0, 5, 1]
KEYS = token_keys(torch.arange(4) << 40, 0, 40).flatten()


def experts(dropout: float, d_ff: int = 37, num_experts: int = 4) -> Experts:
    bank = Experts(num_experts, 8, d_ff, dropout, "layers.1.moe.experts")
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
    return bank


def forward(bank: Experts, counts: list[int], keys: Tensor | None):
    """The experts as a function of their input and parameters."""
    names = [name for name, _ in bank.named_parameters()]

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        groups = RowGroups(torch.tensor(counts))
        return torch.func.functional_call(bank, dict(zip(names, parameters, strict=True)), (x, groups, keys))

    return call


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("counts", "d_ff"), [(COUNTS, 37), ([0, 0, 0, 70], 8), ([9], 1030)])
def test_experts(compare, dropout: float, counts: list[int], d_ff: int) -> None:
    bank, n = experts(dropout, d_ff, len(counts)), sum(counts)
    x = torch.randn(n, 8, generator=torch.Generator().manual_seed(0))
    launches = compare(forward(bank, counts, KEYS[:n]), x, *bank.parameters(), rtol=1e-4, atol=1e-4)
    assert launches == ["_forward", "_backward", "_sum_by_group"]
    assert compare(forward(bank, counts, None), x, *bank.parameters(), rtol=1e-4, atol=1e-4) == launches


def test_experts_under_autocast(compare) -> None:
    bank = experts(0.3)
    call = forward(bank, COUNTS, KEYS[:9])

    def under_autocast(*inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return call(*inputs)

    x = torch.randn(9, 8, generator=torch.Generator().manual_seed(0))
    assert compare(under_autocast, x, *bank.parameters(), rtol=0.1, atol=0.2)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1), (torch.float16, 1e-2)])
def test_bias_alone(compare, dtype: torch.dtype, tolerance: float, ragged: bool) -> None:
    groups = RowGroups(torch.tensor(COUNTS), ragged=ragged)
    z, bias = torch.randn(sum(COUNTS) + 4 * ragged, 37).to(dtype), torch.randn(4, 37).to(dtype)
    launches = compare(lambda z, bias: _add_bias(z, groups, bias), z, bias, rtol=tolerance, atol=tolerance)
    assert launches == ["_forward", "_sum_by_group"]


@needs_grouped_mm
@pytest.mark.parametrize("ragged", [False, True])
def test_plain_bias_equals_a_loop_over_the_experts(ragged: bool) -> None:
    groups, n = RowGroups(torch.tensor(COUNTS), ragged=ragged), sum(COUNTS)
    x = torch.randn(n + 3 * ragged, 4, requires_grad=True)
    weight, bias = torch.randn(4, 8, 4, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    parts = zip(x[:n].split(COUNTS), weight, bias, strict=True)
    expected = torch.cat([rows @ w.T + b for rows, w, b in parts] + [torch.zeros(3, 8)] * ragged)
    y = _grouped_mm(x, groups, weight, bias)
    torch.testing.assert_close(y, expected)
    grad = torch.randn(y.shape)
    for one, other in zip(*(torch.autograd.grad(r, (x, weight, bias), grad) for r in (y, expected)), strict=True):
        torch.testing.assert_close(one, other)


def test_input_and_bias_gradients_are_computed_separately(interpreted) -> None:
    """A split backward computes each of them once."""
    bank, x = experts(0.3), torch.randn(9, 8, requires_grad=True)
    y = interpreted(forward(bank, COUNTS, KEYS[:9]), x, *bank.parameters())
    product = 2 * 9 * 8 * 37  # FLOPs
    for wanted, kernels, products in (
        (x, ["_backward"], 2),
        (bank.b1, ["_backward", "_sum_by_group"], 1),
        (bank.w1, ["_backward"], 2),
    ):
        interpreted.launches.clear()
        with FlopCounterMode(display=False) as flops:
            interpreted(torch.autograd.grad, y, wanted, torch.ones_like(y), True)
        assert interpreted.launches == kernels
        assert flops.get_total_flops() == products * product
