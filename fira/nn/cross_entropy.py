"""Cross-entropy of a linear layer's outputs, computed in blocks of rows without storing all logits."""

from typing import Any

import torch
from torch import Tensor

from fira.nn.kernels.fused import use_fused
from fira.nn.projection import Projection

IGNORE_INDEX = -100  # ignored target, as in torch's cross_entropy
# The gradient of the logits in fp16 is multiplied by this number, because many probabilities are below the smallest
# number of fp16, 6e-8. Entries of the gradient are at most 1; this is the largest power of two without overflow.
FP16_SCALE = 2.0**15
LOGITS = {"cpu": 2**22, "cuda": 2**27}  # logits per block; on a CPU about the size of the cache


def linear_cross_entropy(x: Tensor, projection: Projection, targets: Tensor) -> Tensor:
    """x [N, d], targets [N] int64 → [], the summed loss of the logits of a projection, in nats, at least fp32.

    For each block of tokens the forward computes logits, probabilities and gradients; the gradients are kept for the
    backward, so nothing is recomputed and at most LOGITS logits are in memory. Under autocast products are in its
    precision and sums in full precision.
    """
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    with torch.autocast(kind, enabled=False):
        factor, softcap = projection.factor(dtype), projection.softcap
        return _LinearCrossEntropy.apply(x, projection.weight, factor, targets, softcap)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, factor: Tensor, targets: Tensor, softcap: float) -> Tensor:
        dtype = factor.dtype
        wide = torch.promote_types(x.dtype, torch.float32)
        ctx.scale = FP16_SCALE if dtype == torch.float16 else 1.0
        ctx.dtypes = x.dtype, weight.dtype
        total = x.new_zeros((), dtype=wide)
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        grad_x = torch.empty_like(x, dtype=_sum_dtype(x, dtype)) if needs_x else None
        grad_weight = torch.zeros_like(weight, dtype=_sum_dtype(weight, dtype)) if needs_weight else None
        for span in row_blocks(x, weight):
            block = x[span].to(dtype)
            logits = block @ factor.T
            tanh = logits.to(wide).div_(softcap).tanh_() if softcap else None
            if tanh is not None:
                logits = (softcap * tanh).to(dtype)
            loss, grad_logits = _block_loss(logits, targets[span], wide, ctx.scale, needs_x or needs_weight)
            total += loss
            if tanh is not None:
                grad_logits = (grad_logits * tanh.square_().neg_().add_(1)).to(dtype)
            if grad_x is not None:
                grad_x[span] = product(grad_logits, factor)
            if grad_weight is not None and grad_weight.dtype == dtype:
                grad_weight.addmm_(grad_logits.T, block[:, -weight.shape[1] :])
            elif grad_weight is not None:
                grad_weight += product(grad_logits.T, block[:, -weight.shape[1] :])
        ctx.save_for_backward(grad_x, grad_weight)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        grad_x, grad_weight = (
            None if g is None else (g * (grad.to(g.dtype) / ctx.scale)).to(dtype)
            for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return grad_x, grad_weight, None, None, None


def rows_per_block(device: str, vocab_size: int) -> int:
    """The largest number of rows of a block. device: torch's type."""
    return max(256, LOGITS.get(device, 2**27) // vocab_size)


def row_blocks(x: Tensor, weight: Tensor) -> list[slice]:
    """Blocks of the rows of x [N, d], each with at most LOGITS logits for a weight [V, d], or 256 rows."""
    rows = rows_per_block(x.device.type, len(weight))
    return [slice(start, start + rows) for start in range(0, len(x), rows)]


def _block_loss(
    logits: Tensor, targets: Tensor, wide: torch.dtype, scale: float, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Summed loss [] of logits [n, V] in the dtype `wide`, and its gradient times `scale` in the dtype of the logits.

    Without a gradient the second result has no meaning. The logits are overwritten.
    """
    if use_fused(logits):
        from fira.nn.kernels.softmax_loss import softmax_loss

        return softmax_loss(logits, targets, IGNORE_INDEX, scale, with_gradient).sum(), logits
    counted = (targets != IGNORE_INDEX)[:, None]
    chosen = targets[:, None].clamp(min=0)
    logs = logits.to(wide).log_softmax(-1)
    loss = -(logs.gather(1, chosen) * counted).sum()
    if not with_gradient:
        return loss, logs
    probabilities = logs.exp_()
    gradient = probabilities.scatter_add_(1, chosen, -torch.ones_like(chosen, dtype=wide)).mul_(counted * scale)
    return loss, gradient.to(logits.dtype)


def _sum_dtype(x: Tensor, product: torch.dtype) -> torch.dtype:
    """The dtype in which the gradient of x is summed: that of x, but at least fp32 if products are in fp16."""
    return torch.promote_types(x.dtype, torch.float32) if product == torch.float16 else x.dtype


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b in their dtype, or in fp32 if they are in fp16, whose range is too small for the scaled gradient."""
    if a.dtype != torch.float16:
        return a @ b
    if a.is_cuda and torch.__version__ >= "2.8":
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
