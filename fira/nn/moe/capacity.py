"""How many of a sequence's assignments an expert takes, where that is limited."""

import torch
import torch.nn.functional as F
from torch import Tensor


def within_capacity(experts: Tensor, valid: Tensor, num_experts: int, factor: float) -> Tensor:
    """experts [B, T, k], valid [B, T] → [B, T, k] bool: which assignments an expert takes; padding's are none.

    In each sequence of n valid tokens an expert takes the first ⌈factor · k · n / E⌉ that come to it, in the order of
    the tokens (Fedus et al. 2021, arXiv 2101.03961). Elsewhere the batch is what is counted, which makes a token's fate
    depend on other sequences, on the micro-batch and on the rank.
    """
    batch, length, top_k = experts.shape
    chosen = F.one_hot(experts.flatten(1), num_experts) * valid.repeat_interleave(top_k, 1)[..., None]
    place = chosen.cumsum(1).gather(2, experts.flatten(1)[..., None]).view(batch, length, top_k)
    capacity = torch.ceil(factor * top_k * valid.sum(1) / num_experts)
    return (place <= capacity[:, None, None]) & valid[..., None]
