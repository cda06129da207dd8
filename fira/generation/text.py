"""Text to tokens and back, with the tokenizer that is meant where none is named."""

import os
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from torch import Tensor

from fira.checkpoint.load_model import own_tokenizer
from fira.data.prepare import prepare
from fira.data.tokenizer import eos_id, load_tokenizer
from fira.decoding.decoding import continuation
from fira.decoding.sampling import Sampling
from fira.errors import UserError
from fira.generation.perplexity import perplexity
from fira.generation.speculative import speculate
from fira.generation.utilisation import counting_experts, shares
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
    """A text itself, what is in the file of that name, or for "-" what comes through standard input."""
    try:
        if value == "-":
            return sys.stdin.read()
        return Path(value).read_text(encoding="utf-8") if os.path.isfile(value) else value
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{value}: {error}; give a text file in UTF-8") from None


def continue_text(
    model: LanguageModel,
    prompt: list[int],
    max_new_tokens: int,
    stop: Sequence[str] = (),
    draft: LanguageModel | None = None,
    **sampling: Any,
) -> Iterator[str]:
    """What the model writes after a prompt, until it ends the document: one piece of text per token, as they come.

    A piece is empty while a character is incomplete, or while it may be the beginning of a text in `stop`, before the
    first of which the continuation ends. After an empty prompt a document begins. draft: a smaller model that guesses
    ahead (see `speculate`). sampling: the fields of `Sampling`.
    """
    tokenizer = own_tokenizer(model)
    eos = eos_id(tokenizer)
    prompt = prompt or [eos]  # in training a document follows the end of another
    if draft is None:
        tokens = (new[0] for new in continuation(model, [prompt], max_new_tokens, Sampling(**sampling), eos))
    else:
        if own_tokenizer(draft).to_str() != tokenizer.to_str():
            raise UserError("draft and model have different tokenizers; give a draft that was trained with the same")
        tokens = (new for new in speculate(model, draft, prompt, max_new_tokens, Sampling(**sampling), eos))
    text = TextStream(tokenizer, prompt, stop)
    for token in tokens:
        if token == eos:
            break
        yield text.add(token)
        if text.ended:
            return
    if text.held:
        yield text.held


class TextStream:
    """Tokens to pieces of text that can be shown: whole characters, and nothing of a stop text or behind it.

    held: what may yet become a stop text. ended: one was found.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: list[int], stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, [text for text in stop if text]
        self._stream = DecodeStream(prompt, skip_special_tokens=False)
        self.held = ""
        self.ended = False

    def add(self, token: int) -> str:
        """The text that is certain now."""
        self.held += self._stream.step(self._tokenizer, token) or ""
        found = [self.held.index(text) for text in self._stop if text in self.held]
        self.ended = bool(found)
        starts = (n for text in self._stop for n in range(1, len(text)) if self.held.endswith(text[:n]))
        certain = min(found) if found else len(self.held) - max(starts, default=0)
        piece, self.held = self.held[:certain], "" if found else self.held[certain:]
        return piece


def sample_text(
    model: LanguageModel,
    prompt: str | Sequence[str],
    max_length: int = 100,
    temperature: float = 0.8,
    top_p: float | None = 0.9,
    top_k: int | None = 50,
    stop: Sequence[str] = (),
    **sampling: Any,
) -> str | list[str]:
    """A prompt and what the model writes after it; or several prompts of any lengths, together.

    model: with its tokenizer, as `load_model` gives it. max_length: tokens to write. sampling: see `Sampling`.
    """
    tokenizer = own_tokenizer(model)
    eos = eos_id(tokenizer)
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    ids = [encode(text, tokenizer) or [eos] for text in prompts]
    streams = [TextStream(tokenizer, row, stop) for row in ids]
    chosen = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, **sampling)
    texts = list(prompts)
    for new in continuation(model, ids, max_length, chosen, eos):
        for row, token in new.items():
            if token != eos and not streams[row].ended:
                texts[row] += streams[row].add(token)
        if all(stream.ended for stream in streams):
            break
    texts = [text + stream.held for text, stream in zip(texts, streams, strict=True)]
    return texts[0] if isinstance(prompt, str) else texts


def evaluate_perplexity(model: LanguageModel, text: str) -> float:
    """The perplexity per token of a text of any length, without auxiliary loss, dropout or noise (see `perplexity`)."""
    tokenizer = own_tokenizer(model)
    return perplexity(model, [eos_id(tokenizer), *encode(text, tokenizer)]).perplexity


def expert_utilisation(model: LanguageModel, text: str) -> dict[int, list[float]]:
    """The share of a text's tokens that each expert takes, by the number of the layer; 1/E each is even."""
    tokenizer = own_tokenizer(model)
    with counting_experts(model) as counts:
        perplexity(model, [eos_id(tokenizer), *encode(text, tokenizer)])
    return shares(counts)
