"""Encode and decode text, and generate or evaluate text with a model."""

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from torch import Tensor

from fira.checkpoint.load_model import own_tokenizer
from fira.data.corpus import prepare
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
    """Return the ids of a text.

    tokenizer: a Tokenizer or the path of a tokenizer.json. The default is tokenizer.json in the current folder, or else
    that of `fira-tiny` for the default corpus, which is prepared at the first call.
    """
    return _resolve(tokenizer).encode(text, add_special_tokens=False).ids


def decode(ids: Sequence[int] | Tensor, tokenizer: Tokenizer | str | Path | None = None) -> str:
    """Return the text of ids, including special tokens, the inverse of `encode`.

    ids: a list or a tensor [T], or a batch of one, [1, T], as `generate` returns it. tokenizer: as for `encode`.
    """
    if isinstance(ids, Tensor):
        ids = (ids[0] if ids.dim() == 2 and len(ids) == 1 else ids).tolist()
    return _resolve(tokenizer).decode(ids, skip_special_tokens=False)


def _resolve(tokenizer: Tokenizer | str | Path | None) -> Tokenizer:
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    local = Path("tokenizer.json")
    if tokenizer is None and not local.is_file():
        return _default_tokenizer()
    return load_tokenizer(tokenizer or local)


@cache
def _default_tokenizer() -> Tokenizer:
    corpus = prepare(vocab_size=PRESETS["fira-tiny"].vocab_size)
    assert corpus.tokenizer is not None  # a corpus of text has a tokenizer
    return load_tokenizer(corpus.tokenizer)


def text_or_content(value: str) -> str:
    """Return the content of the file `value`, standard input for "-", or else `value` itself."""
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
    """Yield the continuation of a prompt up to the end of the document, one piece of text per token (`text_pieces`).

    The continuation ends before the first of the texts in `stop`. An empty prompt begins a new document.
    draft: a smaller model for speculative decoding (see `speculate`). sampling: the fields of `Sampling`.
    """
    tokenizer = own_tokenizer(model)
    eos = eos_id(tokenizer)
    prompt = prompt or [eos]  # in training, a document follows the end of the previous one
    if draft is None:
        tokens = (new[0] for new in continuation(model, [prompt], max_new_tokens, Sampling(**sampling), eos))
    else:
        if own_tokenizer(draft).to_str() != tokenizer.to_str():
            raise UserError(
                "draft and model have different tokenizers; give a draft trained with the tokenizer of the model"
            )
        tokens = (new for new in speculate(model, draft, prompt, max_new_tokens, Sampling(**sampling), eos))
    yield from text_pieces(tokenizer, prompt, tokens, max_new_tokens, stop)


def text_pieces(
    tokenizer: Tokenizer, prompt: list[int], tokens: Iterable[int], max_new_tokens: int, stop: Sequence[str] = ()
) -> Iterator[str]:
    """Yield one piece of text per token, up to EOS, to a text in `stop`, or to `max_new_tokens` tokens.

    A piece is empty for EOS, while a character is incomplete, and while the text may continue to one in `stop`.
    """
    eos, text = eos_id(tokenizer), TextStream(tokenizer, prompt, stop)
    for number, token in enumerate(tokens, 1):
        piece = "" if token == eos else text.add(token)
        if token == eos or text.stopped or number == max_new_tokens:
            yield piece + text.pending
            return
        yield piece


class TextStream:
    """Converts tokens to pieces of text: complete characters before the first stop text.

    pending: the end of the text that may be the beginning of a stop text. stopped: whether a stop text was found.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: list[int], stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, [text for text in stop if text]
        self._stream = DecodeStream(prompt, skip_special_tokens=False)
        self.pending = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """Add a token and return the text that is final."""
        self.pending += self._stream.step(self._tokenizer, token) or ""
        found = [self.pending.index(text) for text in self._stop if text in self.pending]
        self.stopped = bool(found)
        prefixes = (n for text in self._stop for n in range(1, len(text)) if self.pending.endswith(text[:n]))
        final = min(found) if found else len(self.pending) - max(prefixes, default=0)
        piece, self.pending = self.pending[:final], "" if found else self.pending[final:]
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
    """Return a prompt with its continuation, or several prompts of any lengths with theirs, generated as one batch.

    model: a model with a tokenizer, as returned by `load_model`. max_length: tokens to generate. sampling: the other
    fields of `Sampling`.
    """
    tokenizer = own_tokenizer(model)
    eos = eos_id(tokenizer)
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    ids = [encode(text, tokenizer) or [eos] for text in prompts]
    streams = [TextStream(tokenizer, row, stop) for row in ids]
    settings = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, **sampling)
    texts = list(prompts)
    for new in continuation(model, ids, max_length, settings, eos):
        for row, token in new.items():
            if token != eos and not streams[row].stopped:
                texts[row] += streams[row].add(token)
        if all(stream.stopped for stream in streams):
            break
    texts = [text + stream.pending for text, stream in zip(texts, streams, strict=True)]
    return texts[0] if isinstance(prompt, str) else texts


def evaluate_perplexity(model: LanguageModel, text: str) -> float:
    """Return the perplexity per token of a text of any length, without auxiliary loss, dropout or noise."""
    tokenizer = own_tokenizer(model)
    return perplexity(model, [eos_id(tokenizer), *encode(text, tokenizer)]).perplexity


def expert_utilisation(model: LanguageModel, text: str) -> dict[int, list[float]]:
    """Return the fraction of a text's assignments to each of the E experts, by layer number; 1/E is balanced."""
    tokenizer = own_tokenizer(model)
    with counting_experts(model) as counts:
        perplexity(model, [eos_id(tokenizer), *encode(text, tokenizer)])
    return shares(counts)
