"""Text to tokens and back, with the tokenizer that is meant where none is named."""

import os
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from torch import Tensor

from fira.data.prepare import prepare
from fira.data.tokenizer import eos_id, load_tokenizer
from fira.errors import UserError
from fira.generation.decoding import continuation
from fira.models.language_model import LanguageModel
from fira.models.registry import PRESETS


def encode(text: str, tokenizer: Tokenizer | str | Path | None = None) -> list[int]:
    """The ids of a text.

    tokenizer: a Tokenizer or the path of a tokenizer.json. Left out, it is the current folder's tokenizer.json if there
    is one, else that of `fira-tiny` trained on the default corpus, which is prepared when it is needed first.
    """
    return _resolve(tokenizer).encode(text, add_special_tokens=False).ids


def decode(ids: Sequence[int] | Tensor, tokenizer: Tokenizer | str | Path | None = None) -> str:
    """The text of ids [T], special tokens included, so that it is what was encoded. tokenizer: as for `encode`."""
    return _resolve(tokenizer).decode(ids.tolist() if isinstance(ids, Tensor) else ids, skip_special_tokens=False)


def _resolve(tokenizer: Tokenizer | str | Path | None) -> Tokenizer:
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    here = Path("tokenizer.json")
    if tokenizer is None and not here.is_file():
        return _default_tokenizer()
    return load_tokenizer(tokenizer or here)


@cache
def _default_tokenizer() -> Tokenizer:
    corpus = prepare(vocab_size=PRESETS["fira-tiny"].vocab_size)
    assert corpus.tokenizer is not None  # only shards can be without
    return load_tokenizer(corpus.tokenizer)


def text_or_content(value: str) -> str:
    """A text itself, or what is in the file of that name."""
    if not os.path.isfile(value):
        return value
    try:
        return Path(value).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{value}: {error}; give a text file in UTF-8") from None


def continue_text(
    model: LanguageModel, tokenizer: Tokenizer, prompt: list[int], max_new_tokens: int, **sampling: float | int | None
) -> Iterator[str]:
    """What the model writes after a prompt, until it ends the document: one piece of text per token, as they come.

    A piece is empty while a character is incomplete. After an empty prompt a document begins. sampling: temperature,
    top_k, top_p and seed, as in `LanguageModel.generate`.
    """
    eos = eos_id(tokenizer)
    prompt = prompt or [eos]  # in training a document follows the end of another
    stream = DecodeStream(prompt, skip_special_tokens=False)
    tokens = torch.tensor([prompt], device=next(model.parameters()).device)
    for new in continuation(model, tokens, max_new_tokens, eos=eos, **sampling):  # type: ignore[arg-type]
        if int(new) == eos:
            return
        yield stream.step(tokenizer, int(new)) or ""
