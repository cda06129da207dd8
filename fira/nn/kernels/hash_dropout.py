"""Fused forms of `fira.nn.dropout`: token keys, and dropout whose mask is not stored.

The kernels use the same int32 arithmetic as the plain form, so that masks are bitwise identical. The backward computes
the mask again from the row keys.
"""

from typing import Any

import torch
from torch import Tensor

from fira.nn.kernels.fused import ceil_div, launch, tiles
from fira.nn.kernels.triton_language import tl, triton

FIRST = tl.constexpr(0x7FEB352D)
SECOND = tl.constexpr(0x846CA68B - (1 << 32))
GOLDEN = tl.constexpr(0x9E3779B9 - (1 << 32))


@triton.jit
def mix(x):
    """`fira.nn.dropout._mix`"""
    x = x * FIRST
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * SECOND
    return x ^ ((x >> 16) & 0xFFFF)


@triton.jit
def keep_mask(rows, columns, salt, threshold):
    """Row keys [R] int32 and channel numbers [C] int32 → [R, C] bool: true where the channel is kept."""
    bits = mix(rows ^ salt)[:, None] ^ mix(columns + 1)[None, :]
    bits = bits * FIRST
    bits = bits ^ ((bits >> 15) & 0x1FFFF)
    return bits * SECOND >= threshold


@triton.jit
def drop_factor(keep, scale, dtype: tl.constexpr):
    """The factor of kept channels, rounded to the dtype as in the plain form, and 0"""
    return tl.where(keep, scale, 0.0).to(dtype).to(tl.float32)


@triton.jit(do_not_specialize=["count", "start"])
def _token_keys(keys, out, count, start, length, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(keys + at // length, mask=at < count, other=0)
    position = (start + at % length).to(tl.int32)
    mixed = mix(mix(key.to(tl.int32) + position * GOLDEN) ^ (key >> 32).to(tl.int32))
    tl.store(out + at, mixed, mask=at < count)


@triton.jit(do_not_specialize=["count", "salt", "threshold"])
def _dropout(x, rows, y, count, width, salt, threshold, scale, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < count)[:, None] & (column < width)[None, :]
    at = row.to(tl.int64)[:, None] * width + column[None, :]
    value = tl.load(x + at, mask=inside)
    keep = keep_mask(tl.load(rows + row, mask=row < count, other=0), column, salt, threshold)
    product = value.to(tl.float32) * drop_factor(keep, scale, value.dtype)
    tl.store(y + at, product.to(value.dtype), mask=inside)


def fused_token_keys(keys: Tensor, start: int, length: int) -> Tensor:
    """`fira.nn.dropout.token_keys` in one kernel."""
    out = torch.empty(len(keys), length, dtype=torch.int32, device=keys.device)
    launch(_token_keys, (ceil_div(out.numel(), 1024),), keys.contiguous(), out, out.numel(), start, length, BLOCK=1024)
    return out


class HashDropout(torch.autograd.Function):
    """x […, C], rows […] int32 token keys → y […, C]. salt, threshold, scale: `Dropout.hash_arguments`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, salt: int, threshold: int, scale: float) -> Tensor:
        rows = rows.expand(x.shape[:-1]).contiguous()
        ctx.save_for_backward(rows)
        ctx.arguments = salt, threshold, scale
        x, y = x.contiguous(), torch.empty(x.shape, dtype=x.dtype, device=x.device)
        grid, tile = tiles(rows.numel(), x.shape[-1])
        launch(_dropout, grid, x, rows, y, rows.numel(), x.shape[-1], *ctx.arguments, **tile)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        return HashDropout.apply(grad, *ctx.saved_tensors, *ctx.arguments), None, None, None, None
