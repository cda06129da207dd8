"""Choice of the next token of several texts with different sampling options."""

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fira.decoding.sampler import Sampler, draw
from fira.decoding.sampling import Sampling


class RowSampler:
    """Sampling options and random generator of one text; equal to those of `fira.decoding.decoding.continuation`."""

    def __init__(self, sampling: Sampling, device: torch.device) -> None:
        self.sampler = Sampler(sampling)
        self.generator = torch.Generator(device)
        if sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(sampling.seed)
        # Rows with equal keys are sampled together. Penalties read the text, and texts differ in length.
        self.key: Hashable = id(self) if self.sampler.penalties else replace(sampling, seed=None)
        if self.sampler.greedy:
            self.key = "greedy"


def next_tokens(samplers: Sequence[RowSampler], texts: Sequence[Sequence[int]], logits: Tensor) -> list[int]:
    """Samplers and tokens so far of each row, and logits [B, V] of its next token → the next tokens."""
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for row, sampler in enumerate(samplers):
        groups[sampler.key].append(row)
    tokens = [0] * len(samplers)
    for rows in groups.values():
        first = samplers[rows[0]].sampler
        selected = logits if len(rows) == len(logits) else logits[rows]
        if first.greedy:
            chosen = selected.argmax(-1)
        else:
            read = texts[rows[0]] if first.penalties else []
            ids = torch.tensor([read] * len(rows), dtype=torch.int64, device=logits.device)
            chosen = draw(first.probabilities(ids, selected), [samplers[row].generator for row in rows])
        for row, token in zip(rows, chosen.tolist(), strict=True):
            tokens[row] = token
    return tokens
