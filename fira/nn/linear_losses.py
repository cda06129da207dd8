"""Any function of the logits of a linear layer, computed in blocks of rows without storing all logits."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fira.nn.cross_entropy import FP16_SCALE, product, row_blocks
from fira.nn.projection import Projection, softcapped

BlockLosses = Callable[[Tensor, slice], Tensor]


def linear_losses(x: Tensor, projection: Projection, losses: BlockLosses) -> Tensor:
    """x [N, d] → [N, …] in at least fp32: `losses` of the logits of a projection.

    losses: called for each block as losses(logits [n, V] in at least fp32, the slice of its rows), returns [n, …].
    The backward computes the logits of each block again, because the gradient of each row is known only then;
    `linear_cross_entropy` is faster for a sum with the same factor for all rows. Under autocast products are in its
    precision.
    """
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    with torch.autocast(kind, enabled=False):
        factor = projection.factor(dtype)

        def capped(logits: Tensor, rows: slice) -> Tensor:
            return losses(softcapped(logits, projection.softcap), rows)

        result: Tensor = _LinearLosses.apply(x, projection.weight, factor, capped)
        return result


class _LinearLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, factor: Tensor, losses: BlockLosses) -> Tensor:
        ctx.losses, ctx.wide = losses, torch.promote_types(x.dtype, torch.float32)
        ctx.save_for_backward(x, weight, factor)
        return torch.cat([losses(_logits(x[rows], factor, ctx.wide), rows) for rows in row_blocks(x, factor)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight, factor = ctx.saved_tensors
        dtype, wide = factor.dtype, ctx.wide
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        # In fp16 gradients are divided by their largest entry and multiplied by a constant, as in the cross-entropy.
        scale = FP16_SCALE / grad.abs().max().clamp(min=1e-30) if dtype == torch.float16 else grad.new_ones(())
        grad_x = torch.empty_like(x, dtype=wide) if needs_x else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        for rows in row_blocks(x, factor):
            with torch.enable_grad():
                logits = _logits(x[rows], factor, wide).requires_grad_()
                value = ctx.losses(logits, rows)
            (grad_logits,) = torch.autograd.grad(value, logits, grad[rows] * scale)
            grad_logits = grad_logits.to(dtype)
            if grad_x is not None:
                grad_x[rows] = product(grad_logits, factor)
            if grad_weight is not None:
                grad_weight += product(grad_logits.T, x[rows, -weight.shape[1] :].to(dtype))
        grads = (None if g is None else (g / scale).to(t.dtype) for g, t in ((grad_x, x), (grad_weight, weight)))
        return *grads, None, None  # type: ignore[return-value]


def _logits(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return (x.detach().to(factor.dtype) @ factor.T).to(dtype)
