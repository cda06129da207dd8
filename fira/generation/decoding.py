"""Tokens one after another."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fira.errors import UserError
from fira.generation.sampling import sample
from fira.models.context import Context, KVCache


@torch.no_grad()
def continuation(
    model: nn.Module,
    tokens: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos: int | None = None,
    seed: int | None = None,
    use_cache: bool = True,
) -> Iterator[Tensor]:
    """The tokens [B] that follow a prompt [B, T], each as soon as it is known (see `LanguageModel.generate`)."""
    config: Any = model.config
    if tokens.shape[1] == 0:
        raise UserError("there is nothing to continue; give at least one token")
    if int(tokens.min()) < 0 or int(tokens.max()) >= config.vocab_size:
        raise UserError(
            f"the prompt has a token outside the model's vocabulary of {config.vocab_size}; use its tokenizer"
        )
    generator = None if seed is None else torch.Generator(tokens.device).manual_seed(seed)
    finished = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    cache: KVCache | None = None
    for _ in range(max_new_tokens):
        if cache is None or tokens.shape[1] > config.seq_len:
            # Learned positions: once the window slides, every token's position changes and nothing can be reused.
            cache = KVCache() if use_cache else None
            logits = model(tokens[:, -config.seq_len :], Context(cache=cache))
        else:
            logits = model(tokens[:, cache.length :], Context(cache=cache))
        new = sample(logits[:, -1].float(), temperature, top_k, top_p, generator)
        if eos is not None:
            new = new.masked_fill(finished, eos)
            finished |= new == eos
        yield new
        if eos is not None and bool(finished.all()):
            return
        tokens = torch.cat([tokens, new[:, None]], dim=1)
