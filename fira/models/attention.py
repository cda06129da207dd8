"""Causal multi-head self-attention."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fira.models.context import KVCache
from fira.models.init import Xavier


class SelfAttention(nn.Module):
    """softmax(q kᵀ / √hd) v per head, each token attending to itself and earlier ones (Vaswani et al. 2017).

    index: the layer's number, which names its part of a cache.
    """

    def __init__(self, d_model: int, n_head: int, index: int) -> None:
        super().__init__()
        if d_model % n_head:
            raise ValueError(f"d_model {d_model} is not divisible by n_head {n_head}")
        self.n_head = n_head
        self.index = index
        self.q, self.k, self.v, self.o = (Xavier(d_model, d_model) for _ in range(4))

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        """x: [B, T, d] → [B, T, d]. With a cache, x are the tokens that follow those in it."""
        q, k, v = (proj(x).unflatten(-1, (self.n_head, -1)).transpose(1, 2) for proj in (self.q, self.k, self.v))
        if cache is not None:
            k, v = cache.extend(self.index, k, v)
        new, seen = q.shape[2], k.shape[2]
        mask = None
        if 1 < new < seen:
            mask = torch.ones(new, seen, dtype=torch.bool, device=x.device).tril(seen - new)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=new == seen)
        return self.o(y.transpose(1, 2).flatten(2))

    @staticmethod
    def flops_per_token(d_model: int, length: int) -> float:
        """Forward FLOPs per token: four projections, and the causal half of scores and values."""
        return 8.0 * d_model * d_model + 2.0 * d_model * length
