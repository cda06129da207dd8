"""Beam search with the implementation of transformers."""

from collections.abc import Iterator
from typing import Any

import torch

from fira.checkpoint.load_model import own_tokenizer
from fira.data.tokenizer import eos_id
from fira.errors import UserError
from fira.generation.text import text_pieces
from fira.huggingface.export_model import as_transformers
from fira.models.language_model import LanguageModel


def beam_search(model: LanguageModel, prompt: list[int], max_new_tokens: int, beams: int, eos: int) -> list[int]:
    """Return the continuation with the highest joint probability that a search with `beams` beams finds.

    A prompt is truncated on the left such that it fits the context together with `max_new_tokens`. Raises UserError
    where no token of it fits or `beams` is less than 1.
    """
    room = model.config.seq_len - max_new_tokens
    if room < 1 or beams < 1:
        raise UserError(
            f"{beams} beams of {max_new_tokens} tokens: give 1 beam or more and fewer tokens than the context, "
            f"{model.config.seq_len}"
        )
    tokens = torch.tensor([prompt[-room:]], device=next(model.parameters()).device)
    wrapped: Any = as_transformers(model)
    output = wrapped.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        num_beams=beams,
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=eos,
        pad_token_id=eos,
    )
    return output[0, tokens.shape[1] :].tolist()


def beam_pieces(model: LanguageModel, prompt: list[int], max_new_tokens: int, beams: int) -> Iterator[str]:
    """Yield the result of `beam_search` as text, in one piece per token."""
    tokenizer = own_tokenizer(model)
    eos = eos_id(tokenizer)
    prompt = prompt or [eos]
    yield from text_pieces(tokenizer, prompt, beam_search(model, prompt, max_new_tokens, beams, eos), max_new_tokens)
