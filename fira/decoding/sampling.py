"""From logits to the next token's probabilities."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from fira.errors import UserError

Processor = Callable[[Tensor, Tensor], Tensor]  # (ids [R, T], logits [R, V]) → logits [R, V]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. What is left at its default does nothing; the order is that of the fields' effect.

    repetition_penalty: logits of tokens in the text so far are divided by it, negative ones multiplied (Keskar et al.
    2019, arXiv 1909.05858). presence_penalty: is subtracted from them. no_repeat_ngram: no n tokens stand twice.
    temperature: 0 takes the likeliest token. top_k: the k likeliest. top_p: the fewest likeliest whose probability
    reaches p (Holtzman et al. 2019, arXiv 1904.09751). min_p: those at least p times as likely as the likeliest.
    typical_p: those whose information is nearest to the entropy, until their probability reaches p (Meister et al.
    2022, arXiv 2202.00666). seed: the same one writes the same text; row i of a batch as if alone with seed + i.
    """

    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    no_repeat_ngram: int | None = None
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature {self.temperature}: give 0 (the likeliest token) or more")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k {self.top_k}: give 1 or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p {self.top_p}: give a probability above 0, at most 1")

    def generators(self, rows: int, device: torch.device) -> list[torch.Generator] | None:
        """A stream of random numbers for each row of a batch; None: torch's own for all."""
        if self.seed is None:
            return None
        return [torch.Generator(device).manual_seed(self.seed + row) for row in range(rows)]


class Sampler:
    """Applies a Sampling. Whatever needs more than a line is transformers', imported when it is asked for."""

    def __init__(self, sampling: Sampling) -> None:
        s = self.sampling = sampling
        self.penalties: list[Processor] = []
        if s.repetition_penalty != 1:
            name = "RepetitionPenaltyLogitsProcessor"
            self.penalties.append(_transformers(name, "repetition_penalty", float(s.repetition_penalty)))
        if s.presence_penalty:
            self.penalties.append(self._subtract_presence)
        if s.no_repeat_ngram is not None:
            self.penalties.append(_transformers("NoRepeatNGramLogitsProcessor", "no_repeat_ngram", s.no_repeat_ngram))
        self.filters: list[Processor] = []
        if s.min_p is not None:
            self.filters.append(_transformers("MinPLogitsWarper", "min_p", s.min_p))
        if s.typical_p is not None:
            self.filters.append(_transformers("TypicalLogitsWarper", "typical_p", s.typical_p))

    @property
    def likeliest(self) -> bool:
        """Whether the next token is simply the one with the greatest logit."""
        return self.sampling.temperature == 0 and not self.penalties

    def _subtract_presence(self, ids: Tensor, logits: Tensor) -> Tensor:
        return logits - torch.zeros_like(logits).scatter(1, ids, self.sampling.presence_penalty)

    def probabilities(self, texts: Tensor, logits: Tensor) -> Tensor:
        """texts: [R, T], all tokens so far; logits [R, V] of the next ones → their probabilities [R, V]."""
        s = self.sampling
        logits = logits.float()
        for process in self.penalties:
            logits = process(texts, logits)
        if s.temperature == 0:
            return torch.zeros_like(logits).scatter(1, logits.argmax(-1, keepdim=True), 1.0)
        logits = (logits - logits.amax(-1, keepdim=True)) / s.temperature  # the greatest is 0, also if that is small
        if s.top_k is not None and s.top_k < logits.shape[-1]:
            logits = logits.masked_fill(logits < logits.topk(s.top_k).values[:, -1:], float("-inf"))
        if s.top_p is not None and s.top_p < 1:
            ordered, order = logits.sort(descending=True)
            likely = ordered.softmax(-1)
            before = likely.cumsum(-1) - likely
            beyond = torch.zeros_like(before, dtype=torch.bool).scatter(1, order, before >= s.top_p)
            logits = logits.masked_fill(beyond, float("-inf"))
        for process in self.filters:
            logits = process(texts, logits)
        return logits.softmax(-1)


def draw(probabilities: Tensor, generators: Sequence[torch.Generator] | None = None) -> Tensor:
    """A token for each row, by its probabilities [R, V] → [R]. generators: one a row; None: torch's own for all.

    Of exponentially distributed times with these rates, the first one's place has just this distribution.
    """
    times = torch.empty_like(probabilities)
    if generators is None:
        times.exponential_()
    else:
        for row, generator in zip(times, generators, strict=True):
            row.exponential_(generator=generator)
    return (probabilities / times).argmax(-1)


def _transformers(name: str, option: str, value: Any) -> Processor:
    try:
        return getattr(import_module("transformers.generation.logits_process"), name)(value)
    except ImportError:
        raise UserError(f"{option} is transformers' work; pip install transformers") from None
    except ValueError as error:
        raise UserError(f"{option} {value}: {error}") from None
