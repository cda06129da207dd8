"""Greedy answers to prompts, which are decoded in groups that do not depend on the number of processes."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from tokenizers import Tokenizer

from fira.data.tokenizer_config import TokenizerConfig
from fira.decoding.decoding import CausalModel, continuation
from fira.decoding.sampling import Sampling

GROUP = 8  # prompts that are decoded together


class EncodedPrompt(NamedTuple):
    """stop: texts before which the answer ends. max_tokens: of the answer."""

    tokens: list[int]
    stop: tuple[str, ...]
    max_tokens: int
    truncated: bool


def prompt_groups(prompts: Sequence[EncodedPrompt]) -> Iterator[list[int]]:
    """Yield the indices of prompts that are decoded together: with equal `max_tokens` and similar lengths."""
    order = sorted(range(len(prompts)), key=lambda index: (prompts[index].max_tokens, len(prompts[index].tokens)))
    for _, same in groupby(order, key=lambda index: prompts[index].max_tokens):
        indices = list(same)
        yield from (indices[start : start + GROUP] for start in range(0, len(indices), GROUP))


class GreedyDecoder:
    """Answers prompts with a model. config: special tokens of the tokenizer."""

    def __init__(self, tokenizer: Tokenizer, config: TokenizerConfig) -> None:
        self._tokenizer = tokenizer
        self._eos = None if config.eos_token is None else tokenizer.token_to_id(config.eos_token)

    def answers(self, model: CausalModel, prompts: Sequence[EncodedPrompt]) -> list[str]:
        """Return the answers to the prompts of one group, each up to its first stop text or EOS."""
        ids: list[list[int]] = [[] for _ in prompts]
        texts, running = [""] * len(prompts), set(range(len(prompts)))
        tokens = [prompt.tokens for prompt in prompts]
        for new in continuation(model, tokens, prompts[0].max_tokens, Sampling(temperature=0), self._eos):
            for row in running & new.keys():
                ids[row].append(new[row])
                texts[row] = self._tokenizer.decode(ids[row], skip_special_tokens=True)
                if new[row] == self._eos or _ends(texts[row], prompts[row].stop):
                    running.remove(row)
            if not running:
                break
        stops = [prompt.stop for prompt in prompts]
        return [text[: min(_ends(text, stop), default=None)] for text, stop in zip(texts, stops, strict=True)]


def _ends(text: str, stop: Sequence[str]) -> list[int]:
    """The first position of each stop text that occurs."""
    return [text.index(mark) for mark in stop if mark in text]
