"""Sampling of the next token: penalties, temperature, truncation, and the draw.

Shapes: R rows of texts with T tokens, V vocabulary; ids [R, T], logits [R, V].
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from fira.errors import UserError
from fira.value_types import ClosedShare, NotNegative, OpenShare, Positive, Seed, Share, check

Processor = Callable[[Tensor, Tensor], Tensor]  # (ids, logits) → logits


@dataclass(frozen=True)
class Sampling:
    """Sampling options, which are applied in the order of the fields. The defaults have no effect.

    repetition_penalty: divisor of the logits of tokens that occur in the text; negative logits are multiplied by it
    (Keskar et al. 2019, arXiv 1909.05858).
    presence_penalty: subtracted from the logits of tokens that occur in the text.
    no_repeat_ngram: no sequence of this many tokens occurs twice.
    temperature: divisor of the logits; 0 selects the most probable token.
    top_k: keep the k most probable tokens.
    top_p: keep the smallest set of most probable tokens whose total probability reaches p (Holtzman et al. 2019,
    arXiv 1904.09751).
    min_p: keep tokens whose probability is at least p times that of the most probable token.
    typical_p: keep the tokens whose surprisal is closest to the entropy, up to a total probability of p (Meister et al.
    2022, arXiv 2202.00666).
    seed: makes the text reproducible. Row i of a batch equals a single text with seed + i.

    Raises UserError for values out of range.
    """

    repetition_penalty: Positive = 1.0
    presence_penalty: float = 0.0
    no_repeat_ngram: int | None = None
    temperature: NotNegative = 1.0
    top_k: int | None = None
    top_p: Share | None = None
    min_p: ClosedShare | None = None
    typical_p: OpenShare | None = None
    seed: Seed | None = None

    def __post_init__(self) -> None:
        for option in fields(self):
            check(option.name, getattr(self, option.name), option.type)

    def generators(self, rows: int, device: torch.device) -> list[torch.Generator] | None:
        """One random generator per row of a batch; None without a seed, for torch's global generator."""
        if self.seed is None:
            return None
        return [torch.Generator(device).manual_seed(self.seed + row) for row in range(rows)]


class Sampler:
    """Applies `Sampling` to logits. Longer processors are those of transformers, imported only if they are used."""

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
    def greedy(self) -> bool:
        """Whether the next token is the argmax of the logits."""
        return self.sampling.temperature == 0 and not self.penalties

    def _subtract_presence(self, ids: Tensor, logits: Tensor) -> Tensor:
        return logits - torch.zeros_like(logits).scatter(1, ids, self.sampling.presence_penalty)

    def probabilities(self, ids: Tensor, logits: Tensor) -> Tensor:
        """ids [R, T], all tokens so far, and logits [R, V] of the next token → its probabilities [R, V]."""
        s = self.sampling
        logits = logits.float()
        for process in self.penalties:
            logits = process(ids, logits)
        if s.temperature == 0:
            return torch.zeros_like(logits).scatter(1, logits.argmax(1, keepdim=True), 1.0)
        # The largest is 0: no overflow at any temperature.
        logits = (logits - logits.amax(1, keepdim=True)) / s.temperature
        if s.top_k is not None:
            kept = logits.topk(min(s.top_k, logits.shape[1])).values
            logits = logits.masked_fill(logits < kept[:, -1:], float("-inf"))
        if s.top_p is not None and s.top_p < 1:
            sorted_logits, order = logits.sort(descending=True)
            sorted_p = sorted_logits.softmax(1)
            preceding = sorted_p.cumsum(1) - sorted_p  # total probability of the more probable tokens
            removed = torch.zeros_like(preceding, dtype=torch.bool).scatter(1, order, preceding >= s.top_p)
            logits = logits.masked_fill(removed, float("-inf"))
        for process in self.filters:
            logits = process(ids, logits)
        return logits.softmax(1)


def draw(probabilities: Tensor, generators: Sequence[torch.Generator] | None = None) -> Tensor:
    """Draw a token per row: probabilities [R, V] → [R]. generators: one per row; None: torch's global generator.

    If time_t is exponentially distributed with rate p_t, the argmin of the times is t with probability p_t.
    """
    times = torch.empty_like(probabilities)
    if generators is None:
        times.exponential_()
    else:
        for row, generator in zip(times, generators, strict=True):
            row.exponential_(generator=generator)
    return (probabilities / times).argmax(1)


def _transformers(name: str, option: str, value: Any) -> Processor:
    try:
        return getattr(import_module("transformers.generation.logits_process"), name)(value)
    except ImportError:
        raise UserError(f"{option} requires transformers; pip install transformers") from None
