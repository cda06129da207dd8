"""How well a model predicts a text of any length."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from fira.errors import UserError
from fira.models.language_model import LanguageModel
from fira.nn.context import Context
from fira.progress_bar import progress_bar

TOGETHER = 4  # windows in one forward; their logits are what needs memory


@dataclass(frozen=True)
class TextLoss:
    """nats: mean loss per predicted token. tokens: how many were predicted."""

    nats: float
    tokens: int

    @classmethod
    def mean(cls, losses: Sequence[Self]) -> Self:
        """Of several texts, over all their tokens."""
        tokens = sum(loss.tokens for loss in losses)
        return cls(sum(loss.nats * loss.tokens for loss in losses) / tokens, tokens)

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats)

    def bits_per_byte(self, size: int) -> float:
        """The loss per byte of a text of `size` bytes, which other tokenizers can be compared with."""
        return self.nats * self.tokens / math.log(2) / size

    def describe(self, size: int) -> str:
        """All of it in one line. size: bytes of the text."""
        return (
            f"perplexity {self.perplexity:.5g}: {self.nats:.4f} nats per token, "
            f"{self.bits_per_byte(size):.4f} bits per byte, {self.tokens:,} tokens"
        )


@torch.no_grad()
def perplexity(model: LanguageModel, ids: Sequence[int] | Tensor, progress: bool = False) -> TextLoss:
    """The loss of every token of a text [N] but the first, each counted once, without dropout or auxiliary loss.

    The text is read in windows as long as the model's context that overlap by half, so that no token but the first
    ones is predicted from less than half a context. progress: show a bar where it takes more than a few seconds.
    Raises UserError where there is nothing to predict.
    """
    ids = torch.as_tensor(ids, dtype=torch.int64, device=next(model.parameters()).device)
    count = len(ids) - 1
    if count < 1:
        raise UserError(f"a text of {len(ids)} tokens has nothing to predict; give at least two")
    if int(ids.min()) < 0 or int(ids.max()) >= model.config.vocab_size:
        raise UserError(f"a token is outside the model's vocabulary of {model.config.vocab_size}; use its tokenizer")
    length = min(model.config.seq_len, count)
    ends = [*range(length, count, max(1, length // 2)), count]
    fresh = torch.tensor([length, *(after - before for before, after in pairwise(ends))])  # predictions new in a window
    windows = ids.unfold(0, length + 1, 1)[torch.tensor(ends) - length]
    total = 0.0
    with progress_bar(count, "tokens", progress) as bar:
        for some, new in zip(windows.split(TOGETHER), fresh.split(TOGETHER), strict=True):
            logits, targets = model(some[:, :-1], Context()), some[:, 1:]
            losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none").view_as(targets)
            total += float(losses.cpu().double()[torch.arange(length) >= length - new[:, None]].sum())
            bar.update(int(new.sum()))
    return TextLoss(total / count, count)
