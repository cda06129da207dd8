"""The training objective: next-token cross-entropy, so weighted that all micro-batches of all ranks make one mean."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fira.data.loader import IGNORE
from fira.models.context import Context


def objective(logits: Tensor, targets: Tensor, context: Context) -> tuple[Tensor, Tensor]:
    """logits [B, T, V], targets [B, T] with −100 where nothing is to be learnt → (objective, summed loss).

    The objective is the sum over this micro-batch's tokens times `context.loss_weight`, one over the number of tokens
    in the global batch: gradients then add up to those of the mean, whoever computes them.
    """
    logits = logits if logits.dtype in (torch.float32, torch.float64) else logits.float()
    total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
    return total * context.loss_weight, total
