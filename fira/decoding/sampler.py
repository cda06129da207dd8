"""Sampling of the next token: penalties, temperature, truncation, and the draw.

Shapes: R rows of texts with T tokens, V vocabulary; ids [R, T], logits [R, V].
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from fira.decoding.sampling import LEAST_TEMPERATURE, Sampling
from fira.errors import UserError

Processor = Callable[[Tensor, Tensor], Tensor]  # (ids, logits) → logits


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
        return self.sampling.temperature < LEAST_TEMPERATURE and not self.penalties

    def _subtract_presence(self, ids: Tensor, logits: Tensor) -> Tensor:
        return logits - torch.zeros_like(logits).scatter(1, ids, self.sampling.presence_penalty)

    def probabilities(self, ids: Tensor, logits: Tensor) -> Tensor:
        """ids [R, T], all tokens so far, and logits [R, V] of the next token → its probabilities [R, V]."""
        s = self.sampling
        logits = logits.float()
        for process in self.penalties:
            logits = process(ids, logits)
        if s.temperature < LEAST_TEMPERATURE:
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


def make_generators(sampling: Sampling, rows: int, device: torch.device) -> list[torch.Generator] | None:
    """One random generator per row of a batch; None without a seed, for torch's global generator."""
    if sampling.seed is None:
        return None
    return [torch.Generator(device).manual_seed(sampling.seed + row) for row in range(rows)]


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
