"""Fused form of `fira.nn.cross_entropy.token_losses`: the loss of each row of logits, and its gradient in their place.

One program per row reads the logits twice: for log Σ exp, with a running maximum, and for the gradient.
"""

import torch
from torch import Tensor

from fira.nn.kernels.fused import launch, power_of_two
from fira.nn.kernels.triton_language import tl, triton


@triton.jit
def _softmax_loss(
    logits, targets, losses, width, scale, IGNORED: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0)
    logits += row.to(tl.int64) * width
    target = tl.load(targets + row)
    counted = target != IGNORED
    chosen = tl.load(logits + tl.where(counted, target, 0)).to(tl.float32)  # before the gradient overwrites it
    highest = float("-inf")
    total = 0.0
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)
        x = tl.load(logits + column, mask=column < width, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(highest, tl.max(x, 0))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(x - higher), 0)
        highest = higher
    normaliser = highest + tl.log(total)
    tl.store(losses + row, tl.where(counted, normaliser - chosen, 0.0))
    if GRADIENT:
        factor = tl.where(counted, scale, 0.0)
        for first in range(0, width, BLOCK):
            column = first + tl.arange(0, BLOCK)
            x = tl.load(logits + column, mask=column < width, other=0.0).to(tl.float32)
            gradient = (tl.exp(x - normaliser) - (column == target).to(tl.float32)) * factor
            tl.store(logits + column, gradient.to(logits.dtype.element_ty), mask=column < width)


def softmax_loss(logits: Tensor, targets: Tensor, ignored: int, scale: float, gradient: bool) -> Tensor:
    """logits [n, V], targets [n] int64 → losses [n] fp32, 0 where the target is `ignored`.

    gradient: overwrite the logits with the gradient of the sum of the losses, times `scale`.
    """
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    width, block = logits.shape[1], min(4096, power_of_two(logits.shape[1]))
    constants = {"IGNORED": ignored, "GRADIENT": gradient, "BLOCK": block, "num_warps": 8}
    launch(_softmax_loss, (len(logits),), logits, targets.contiguous(), losses, width, scale, **constants)
    return losses
