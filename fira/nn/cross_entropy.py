"""Cross-entropy of a linear layer's outputs, which are never there all at once."""

from typing import Any

import torch
from torch import Tensor

IGNORE_INDEX = -100  # a target that counts for nothing, as in torch's cross_entropy
LOGITS = {"cpu": 2**22, "cuda": 2**27}  # at a time: on a CPU, about what stays in a cache


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """x [N, d], weight [V, d], targets [N] int64 → [], the summed loss of the logits x weightᵀ, in nats, at least fp32.

    Some tokens at a time, logits are turned into probabilities and these into gradients, which wait for the backward:
    nothing is computed twice, and memory holds LOGITS of them. Under autocast products are in its precision, sums not.
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
        of_x, of_weight = ctx.needs_input_grad[:2]
        grad_x = torch.empty_like(x) if of_x else None
        grad_weight = torch.zeros_like(weight) if of_weight else None
        factor = weight.to(dtype)
        rows = max(256, LOGITS.get(x.device.type, 2**27) // len(weight))
        for start in range(0, len(x), rows):
            span = slice(start, start + rows)
            some = x[span].to(dtype)
            learnt = (targets[span] != IGNORE_INDEX)[:, None]
            chosen = targets[span, None].clamp(min=0)
            logs = (some @ factor.T).to(wide).log_softmax(-1)
            total -= (logs.gather(1, chosen) * learnt).sum()
            if grad_x is None and grad_weight is None:
                continue
            slope = logs.exp_().scatter_add_(1, chosen, -torch.ones_like(chosen, dtype=wide)).mul_(learnt).to(dtype)
            if grad_x is not None:
                grad_x[span] = slope @ factor
            if grad_weight is not None and grad_weight.dtype == dtype:
                grad_weight.addmm_(slope.T, some)
            elif grad_weight is not None:
                grad_weight += slope.T @ some
        ctx.save_for_backward(grad_x, grad_weight)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_x, grad_weight = (None if g is None else g * grad.to(g.dtype) for g in ctx.saved_tensors)
        return grad_x, grad_weight, None, None
