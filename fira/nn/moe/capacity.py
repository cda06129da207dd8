"""Expert capacity: a limit on the assignments per expert and sequence."""

import torch
import torch.nn.functional as F
from torch import Tensor


def within_capacity(experts: Tensor, valid: Tensor, num_experts: int, factor: float) -> Tensor:
    """experts [B, T, k], valid [B, T] → [B, T, k] bool: the accepted assignments; false for padding.

    In a sequence of n valid tokens an expert accepts the first ⌈factor · k · n / E⌉ assignments in the order of the
    tokens (Fedus et al. 2021, arXiv 2101.03961). Other implementations count per batch, so that the result for a token
    depends on the other sequences, on the micro-batch and on the rank.
    """
    batch, length, top_k = experts.shape
    chosen = F.one_hot(experts.flatten(1), num_experts) * valid.repeat_interleave(top_k, 1)[..., None]
    place = chosen.cumsum(1).gather(2, experts.flatten(1)[..., None]).view(batch, length, top_k)
    capacity = torch.ceil(factor * top_k * valid.sum(1) / num_experts)
    return (place <= capacity[:, None, None]) & valid[..., None]
