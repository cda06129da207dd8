"""Attention masks of transformers as the first token and the end of each sequence."""

import torch
from torch import Tensor


def starts_and_ends(mask: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Attention mask [B, T] → first token [B] and end [B] of each sequence; None if no sequence has padding there."""
    if mask.dim() != 2:
        raise ValueError(f"attention_mask has {mask.dim()} dimensions; give [batch, tokens]")
    ones = mask.bool()
    if ones.all():
        return None, None
    starts = ones.int().argmax(1)
    ends = starts + ones.sum(1)
    positions = torch.arange(mask.shape[1], device=mask.device)
    if not torch.equal(ones, (positions >= starts[:, None]) & (positions < ends[:, None])):
        raise ValueError(
            "attention_mask has a zero between ones; padding is allowed before and after a sequence only. If a prompt "
            "contains the padding token, pass attention_mask to generate()"
        )
    return starts if starts.any() else None, None if ones[:, -1].all() else ends
