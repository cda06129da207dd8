"""Cross-entropy of a linear layer's outputs, computed in blocks of rows without storing all logits."""

from typing import Any

import torch
from torch import Tensor

IGNORE_INDEX = -100  # ignored target, as in torch's cross_entropy
LOGITS = {"cpu": 2**22, "cuda": 2**27}  # logits per block; on a CPU about the size of the cache


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """x [N, d], weight [V, d], targets [N] int64 → [], the summed loss of the logits x weightᵀ, in nats, at least fp32.

    For each block of tokens the forward computes logits, probabilities and gradients; the gradients are kept for the
    backward, so nothing is recomputed and at most LOGITS logits are in memory. Under autocast products are in its
    precision and sums in full precision.
    """
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    with torch.autocast(kind, enabled=False):
        return _LinearCrossEntropy.apply(x, weight, targets, dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        total = x.new_zeros((), dtype=wide)
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        grad_x = torch.empty_like(x) if needs_x else None
        grad_weight = torch.zeros_like(weight) if needs_weight else None
        factor = weight.to(dtype)
        rows = max(256, LOGITS.get(x.device.type, 2**27) // len(weight))
        for start in range(0, len(x), rows):
            span = slice(start, start + rows)
            block = x[span].to(dtype)
            counted = (targets[span] != IGNORE_INDEX)[:, None]
            chosen = targets[span, None].clamp(min=0)
            logs = (block @ factor.T).to(wide).log_softmax(-1)
            total -= (logs.gather(1, chosen) * counted).sum()
            if grad_x is None and grad_weight is None:
                continue
            grad_logits = (
                logs.exp_().scatter_add_(1, chosen, -torch.ones_like(chosen, dtype=wide)).mul_(counted).to(dtype)
            )
            if grad_x is not None:
                grad_x[span] = grad_logits @ factor
            if grad_weight is not None and grad_weight.dtype == dtype:
                grad_weight.addmm_(grad_logits.T, block)
            elif grad_weight is not None:
                grad_weight += grad_logits.T @ block
        ctx.save_for_backward(grad_x, grad_weight)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_x, grad_weight = (None if g is None else g * grad.to(g.dtype) for g in ctx.saved_tensors)
        return grad_x, grad_weight, None, None
