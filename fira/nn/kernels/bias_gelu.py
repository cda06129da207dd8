"""Fused bias of experts, alone or followed by GELU and dropout; see `fira.nn.moe.grouped_linear`.

Shapes: n rows sorted by expert, E experts; ends [E] int32, the end of each expert's group of rows.

    AddBias        y = z + bias[e]                  for rows of expert e; y = z for rows after the last group
    BiasGelu       h = drop(gelu(z + bias[e]))      its gradient of z is computed from z again
    sum_by_group   grad_bias[e] = Σ_{rows of e} grad_z, summed in fp32 in a fixed order
"""

from typing import Any

import torch
from torch import Tensor

from fira.nn.kernels.fused import ceil_div, launch, power_of_two, tiles
from fira.nn.kernels.gated_activation import gelu, gelu_derivative
from fira.nn.kernels.hash_dropout import drop_factor, keep_mask
from fira.nn.kernels.triton_language import tl, triton

Mask = tuple[Tensor, int, int, float]  # row keys [n], salt, threshold and scale of a Dropout


@triton.jit
def _biased(z, bias, ends, row, column, count, width, experts, EXPERTS: tl.constexpr):
    """z + bias of the rows' experts, in fp32"""
    expert = tl.arange(0, EXPERTS)
    end = tl.load(ends + expert, mask=expert < experts, other=0)
    ended = (row[:, None] >= end[None, :]) & (expert < experts)[None, :]
    group = tl.sum(ended.to(tl.int32), 1)
    inside = (row < count)[:, None] & (column < width)[None, :]
    x = tl.load(z + row.to(tl.int64)[:, None] * width + column[None, :], mask=inside, other=0.0).to(tl.float32)
    inside = inside & (group < experts)[:, None]
    at = group.to(tl.int64)[:, None] * width + column[None, :]
    return x + tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["count", "salt", "threshold"])
def _forward(
    z,
    bias,
    ends,
    keys,
    out,
    count,
    width,
    experts,
    salt,
    threshold,
    scale,
    EXPERTS: tl.constexpr,
    GELU: tl.constexpr,
    DROP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    y = _biased(z, bias, ends, row, column, count, width, experts, EXPERTS)
    if GELU:
        y = gelu(y)
    if DROP:
        keep = keep_mask(tl.load(keys + row, mask=row < count, other=0), column, salt, threshold)
        y *= drop_factor(keep, scale, out.dtype.element_ty)
    at = row.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(out + at, y.to(out.dtype.element_ty), mask=(row < count)[:, None] & (column < width)[None, :])


@triton.jit(do_not_specialize=["count", "salt", "threshold"])
def _backward(
    z,
    bias,
    ends,
    keys,
    grad,
    grad_z,
    count,
    width,
    experts,
    salt,
    threshold,
    scale,
    EXPERTS: tl.constexpr,
    DROP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    at = row.to(tl.int64)[:, None] * width + column[None, :]
    inside = (row < count)[:, None] & (column < width)[None, :]
    g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    if DROP:
        keep = keep_mask(tl.load(keys + row, mask=row < count, other=0), column, salt, threshold)
        g *= drop_factor(keep, scale, grad.dtype.element_ty)
    g *= gelu_derivative(_biased(z, bias, ends, row, column, count, width, experts, EXPERTS))
    tl.store(grad_z + at, g.to(grad_z.dtype.element_ty), mask=inside)


@triton.jit
def _sum_by_group(grad, ends, out, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    expert = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    start = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends + expert)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(start, end, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < end)[:, None] & (column < width)[None, :]
        at = row.to(tl.int64)[:, None] * width + column[None, :]
        total += tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + expert * width + column, tl.sum(total, 0).to(out.dtype.element_ty), mask=column < width)


class AddBias(torch.autograd.Function):
    """z [n, w], bias [E, w] → z + bias [n, w], differentiable in z."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, bias: Tensor, ends: Tensor) -> Tensor:
        return _run_forward(z.contiguous(), bias.contiguous(), ends, None, gelu=False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None


class BiasGelu(torch.autograd.Function):
    """z [n, w], bias [E, w] → h [n, w], differentiable in z. mask: of the dropout; None: no dropout."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, bias: Tensor, ends: Tensor, mask: Mask | None) -> Tensor:
        z, bias = z.contiguous(), bias.contiguous()
        ctx.save_for_backward(z, bias, ends, None if mask is None else mask[0])
        ctx.dropout = None if mask is None else mask[1:]
        return _run_forward(z, bias, ends, mask, gelu=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        z, bias, ends, rows = ctx.saved_tensors
        grad, grad_z = grad.contiguous(), torch.empty_like(z)
        _launch(_backward, z, bias, ends, None if rows is None else (rows, *ctx.dropout), grad, grad_z)
        return grad_z, None, None, None


def sum_by_group(grad: Tensor, ends: Tensor, dtype: torch.dtype) -> Tensor:
    """grad [n, w] → [E, w], the sum over the rows of each expert."""
    grad, out = grad.contiguous(), grad.new_empty(len(ends), grad.shape[1], dtype=dtype)
    launch(_sum_by_group, (len(ends), ceil_div(grad.shape[1], 32)), grad, ends, out, grad.shape[1], ROWS=64, COLUMNS=32)
    return out


def _run_forward(z: Tensor, bias: Tensor, ends: Tensor, mask: Mask | None, gelu: bool) -> Tensor:
    out = torch.empty_like(z)
    _launch(_forward, z, bias, ends, mask, out, GELU=gelu)
    return out


def _launch(
    kernel: Any, z: Tensor, bias: Tensor, ends: Tensor, mask: Mask | None, *tensors: Tensor, **constants: bool
) -> None:
    """Launch on tiles of z. Without dropout the row keys are not read, and `ends` takes their place."""
    rows, *dropout = (ends, 0, 0, 0.0) if mask is None else mask
    grid, tile = tiles(*z.shape)
    arguments = (z, bias, ends, rows.contiguous(), *tensors, *z.shape, len(bias), *dropout)
    launch(kernel, grid, *arguments, EXPERTS=power_of_two(len(bias)), DROP=mask is not None, **constants, **tile)
