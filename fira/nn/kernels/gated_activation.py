"""Fused form of `fira.nn.mlp.gated`: activation(gate) ⊙ a in one kernel, and both gradients in another.

The two inputs are tensors of one shape, or the two halves of the last dimension of one tensor. In the second case the
backward writes both gradients into one tensor.
"""

from typing import Any

import torch
from torch import Tensor

from fira.nn.kernels.fused import launch, tiles
from fira.nn.kernels.triton_language import tl, triton


@triton.jit
def gelu(x):
    """x Φ(x)"""
    return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_derivative(x):
    """Φ(x) + x φ(x)"""
    return 0.5 * (1 + tl.erf(x * 0.7071067811865476)) + x * tl.exp(-0.5 * x * x) * 0.3989422804014327


@triton.jit(do_not_specialize=["count"])
def _gated(gate, a, out, count, width, stride, SILU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < count)[:, None] & (column < width)[None, :]
    at = row.to(tl.int64)[:, None] * stride + column[None, :]
    x = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    y = x * tl.sigmoid(x) if SILU else gelu(x)
    y *= tl.load(a + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row.to(tl.int64)[:, None] * width + column[None, :], y.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["count"])
def _gated_backward(
    grad,
    gate,
    a,
    grad_gate,
    grad_a,
    count,
    width,
    stride,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < count)[:, None] & (column < width)[None, :]
    at = row.to(tl.int64)[:, None] * stride + column[None, :]
    grad_y = tl.load(grad + row.to(tl.int64)[:, None] * width + column[None, :], mask=inside, other=0.0).to(tl.float32)
    x = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    if SILU:
        y = x * tl.sigmoid(x)
        derivative = tl.sigmoid(x) * (1 + x - y)
    else:
        y = gelu(x)
        derivative = gelu_derivative(x)
    derivative *= tl.load(a + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(grad_gate + at, (grad_y * derivative).to(grad_gate.dtype.element_ty), mask=inside)
    tl.store(grad_a + at, (grad_y * y).to(grad_a.dtype.element_ty), mask=inside)


class Gated(torch.autograd.Function):
    """gate and a […, h], or gate [n, 2h] that contains both and a = None → […, h]. silu: SiLU, otherwise GELU."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, a: Tensor | None, silu: bool) -> Tensor:
        gate, a = gate.contiguous(), None if a is None else a.contiguous()
        ctx.save_for_backward(gate, a)
        ctx.silu = silu
        first, second = (gate, a) if a is not None else gate.chunk(2, -1)
        out = torch.empty(first.shape, dtype=torch.promote_types(first.dtype, second.dtype), device=gate.device)
        _launch(_gated, first, first, second, out, silu=silu, stride=gate.shape[-1])
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        gate, a = ctx.saved_tensors
        grad_gate, grad_a = torch.empty_like(gate), None if a is None else torch.empty_like(a)
        values = (gate, a) if a is not None else gate.chunk(2, -1)
        grads = (grad_gate, grad_a) if a is not None else grad_gate.chunk(2, -1)
        arguments = (grad.contiguous(), *values, *grads)
        _launch(_gated_backward, values[0], *arguments, silu=ctx.silu, stride=gate.shape[-1])
        return grad_gate, grad_a, None


def _launch(kernel: Any, like: Tensor, *arguments: Tensor, silu: bool, stride: int) -> None:
    """Launch on rows of the width of `like`. stride: elements between rows of the inputs."""
    count, width = like.numel() // like.shape[-1], like.shape[-1]
    grid, tile = tiles(count, width)
    launch(kernel, grid, *arguments, count, width, stride, SILU=silu, **tile)
