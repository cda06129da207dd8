"""From logits to the next token."""

import torch
from torch import Tensor

from fira.errors import UserError


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """logits: [B, V] → [B] int64.

    temperature 0 takes the likeliest. top_k keeps the k likeliest; top_p then keeps the smallest set of likeliest
    tokens whose probability reaches p (nucleus sampling, Holtzman et al. 2019, arXiv 1904.09751).
    """
    if not 0 <= temperature < float("inf"):
        raise UserError(f"temperature {temperature}: give 0 (the likeliest token) or more")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k {top_k}: give 1 or more")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p {top_p}: give a probability above 0, at most 1")
    if temperature == 0:
        return logits.argmax(-1)
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # the greatest is 0, however small the temperature
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], float("-inf"))
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(descending=True)
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        beyond = torch.zeros_like(before, dtype=torch.bool).scatter(1, order, before >= top_p)
        logits = logits.masked_fill(beyond, float("-inf"))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
