"""Beam search, which is transformers'."""

from typing import Any

import torch

from fira.checkpoint.load_model import own_tokenizer
from fira.data.tokenizer import eos_id
from fira.errors import UserError
from fira.generation.text import decode
from fira.huggingface.export import as_transformers
from fira.models.language_model import LanguageModel


def beam_search(model: LanguageModel, prompt: list[int], max_new_tokens: int, beams: int, eos: int) -> list[int]:
    """The tokens after a prompt that are likeliest together, as far as `beams` beginnings kept at a time find them.

    Of a prompt that leaves no room in the context its last tokens are kept. UserError where nothing of it would be.
    """
    room = model.config.seq_len - max_new_tokens
    if room < 1 or beams < 1:
        raise UserError(
            f"{beams} beams of {max_new_tokens} tokens: give 1 or more, within a context of {model.config.seq_len}"
        )
    tokens = torch.tensor([prompt[-room:]], device=next(model.parameters()).device)
    wrapped: Any = as_transformers(model)
    found = wrapped.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        num_beams=beams,
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=eos,
        pad_token_id=eos,
    )
    return found[0, tokens.shape[1] :].tolist()


def beam_text(model: LanguageModel, prompt: list[int], max_new_tokens: int, beams: int) -> str:
    """`beam_search` as text, without the end of the document."""
    tokenizer = own_tokenizer(model)
    eos = eos_id(tokenizer)
    found = beam_search(model, prompt or [eos], max_new_tokens, beams, eos)
    return decode([token for token in found if token != eos], tokenizer)
