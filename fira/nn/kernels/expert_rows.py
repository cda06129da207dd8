"""Fused forms of `fira.nn.moe.permutation`: gather of the rows of tokens for experts, and weighted sum of the outputs.

Shapes: N tokens, k experts per token, N·k assignments; order, inverse [N·k] int64 as in that file.

    gather        out[i] = x[order[i] // k]                                  [N, d] → [N·k, d]
    combine       out[t] = Σ_j weights[t, j] · rows[inverse[t·k + j]]        [N·k, h] → [N, h], summed in fp32
"""

from typing import Any

import torch
from torch import Tensor

from fira.nn.kernels.fused import ceil_div, launch, power_of_two, tiles
from fira.nn.kernels.triton_language import tl, triton


@triton.jit(do_not_specialize=["count"])
def _gather(x, order, out, count, width, COPIES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < count)[:, None] & (column < width)[None, :]
    token = tl.load(order + row, mask=row < count, other=0) // COPIES
    value = tl.load(x + token[:, None] * width + column[None, :], mask=inside)
    tl.store(out + row.to(tl.int64)[:, None] * width + column[None, :], value, mask=inside)


@triton.jit(do_not_specialize=["count"])
def _combine(
    rows,
    inverse,
    weights,
    out,
    count,
    width,
    COPIES: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (token < count)[:, None] & (column < width)[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for j in range(COPIES):
        assignment = token.to(tl.int64) * COPIES + j
        position = tl.load(inverse + assignment, mask=token < count, other=0)
        value = tl.load(rows + position[:, None] * width + column[None, :], mask=inside, other=0.0).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(weights + assignment, mask=token < count, other=0.0).to(tl.float32)[:, None]
        total += value
    tl.store(out + token.to(tl.int64)[:, None] * width + column[None, :], total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["count"])
def _combine_backward(
    grad,
    rows,
    weights,
    order,
    grad_rows,
    grad_weights,
    count,
    width,
    COPIES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    assignment = tl.load(order + row, mask=row < count, other=0)
    weight = tl.load(weights + assignment, mask=row < count, other=0.0).to(tl.float32)
    products = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, width, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        inside = (row < count)[:, None] & (column < width)[None, :]
        at = row.to(tl.int64)[:, None] * width + column[None, :]
        grad_y = tl.load(grad + (assignment // COPIES)[:, None] * width + column[None, :], mask=inside, other=0.0)
        grad_y = grad_y.to(tl.float32)
        products += grad_y * tl.load(rows + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_rows + at, (grad_y * weight[:, None]).to(grad_rows.dtype.element_ty), mask=inside)
    tl.store(grad_weights + assignment, tl.sum(products, 1).to(grad_weights.dtype.element_ty), mask=row < count)


class GatherRows(torch.autograd.Function):
    """x [N, d], order, inverse [N·copies] → [N·copies, d]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.copies = copies
        x, out = x.contiguous(), x.new_empty(len(order), x.shape[1])
        grid, tile = tiles(*out.shape)
        launch(_gather, grid, x, order, out, *out.shape, COPIES=copies, **tile)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _sum_rows(grad, ctx.saved_tensors[0], None, ctx.copies, grad.dtype), None, None, None


class WeightedSum(torch.autograd.Function):
    """rows [N·k, h], weights [N, k], order, inverse [N·k] → [N, h] in the wider dtype of rows and weights."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weights, order)
        dtype = torch.promote_types(rows.dtype, weights.dtype)
        return _sum_rows(rows, inverse, weights.contiguous(), weights.shape[1], dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows, weights, order = (saved.contiguous() for saved in ctx.saved_tensors)
        grad_rows, grad_weights = torch.empty_like(rows), torch.empty_like(weights)
        count, width = rows.shape
        constants = {"COPIES": weights.shape[1], "ROWS": 8, "COLUMNS": min(256, power_of_two(width))}
        arguments = (grad.contiguous(), rows, weights, order, grad_rows, grad_weights, count, width)
        launch(_combine_backward, (ceil_div(count, 8),), *arguments, **constants)
        return grad_rows, grad_weights, None, None


def _sum_rows(rows: Tensor, inverse: Tensor, weights: Tensor | None, copies: int, dtype: torch.dtype) -> Tensor:
    """`combine` of the diagram, with all weights 1 if there are none."""
    rows, out = rows.contiguous(), rows.new_empty(len(inverse) // copies, rows.shape[1], dtype=dtype)
    grid, tile = tiles(*out.shape)
    arguments = (rows, inverse, rows if weights is None else weights, out, *out.shape)  # `rows` is not read
    launch(_combine, grid, *arguments, COPIES=copies, WEIGHTED=weights is not None, **tile)
    return out
