"""Perplexity of a text of any length.

N:        tokens of the text, N − 1 of which are predicted
length:   predictions per window, at most the model's context; consecutive windows overlap by half
windows:  [W, length + 1] tokens
fresh:    [W] number of a window's last predictions, which no earlier window contains
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from fira.data.text_windows import document_numbers
from fira.errors import UserError
from fira.models.language_model import LanguageModel
from fira.nn.context import Context, DecodingContext
from fira.nn.documents import Documents
from fira.progress_bar import progress_bar

TOKENS_PER_FORWARD = 2048  # large products are faster; limited by the memory of the logits


@dataclass(frozen=True)
class TextLoss:
    """nats: mean loss per predicted token. tokens: number of predicted tokens."""

    nats: float
    tokens: int

    @classmethod
    def mean(cls, losses: Sequence[Self]) -> Self:
        """Return the loss of several texts, averaged over all their tokens."""
        tokens = sum(loss.tokens for loss in losses)
        return cls(sum(loss.nats * loss.tokens for loss in losses) / tokens, tokens)

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats)

    def bits_per_byte(self, size: int) -> float:
        """Return the loss in bits per byte of a text of `size` bytes, which does not depend on the tokenizer."""
        return self.nats * self.tokens / math.log(2) / size

    def describe(self, size: int) -> str:
        """Return all values as one line. size: length of the text in bytes."""
        return (
            f"perplexity {self.perplexity:.5g}: {self.nats:.4f} nats per token, "
            f"{self.bits_per_byte(size):.4f} bits per byte, {self.tokens:,} tokens"
        )


@torch.no_grad()
def perplexity(
    model: LanguageModel, ids: Sequence[int] | Tensor, progress: bool = False, separator: int | None = None
) -> TextLoss:
    """Return the mean loss of a text [N] over all tokens except the first, without dropout or auxiliary loss.

    The windows overlap by half, so that every token after the first half window is predicted from at least half a
    context. progress: show a progress bar. separator: the token that begins each document; documents are kept apart.
    Raises UserError for fewer than two tokens or an id outside the vocabulary.
    """
    ids = torch.as_tensor(ids, dtype=torch.int64, device=next(model.parameters()).device)
    count = len(ids) - 1
    if count < 1:
        raise UserError(f"a text of {len(ids)} tokens has nothing to predict; give at least two")
    if int(ids.min()) < 0 or int(ids.max()) >= model.config.vocab_size:
        raise UserError(f"a token is outside the model's vocabulary of {model.config.vocab_size}; use its tokenizer")
    length = min(model.config.seq_len, count)
    ends = [*range(length, count, max(1, length // 2)), count]
    fresh = torch.tensor([length, *(after - before for before, after in pairwise(ends))])
    windows = ids.unfold(0, length + 1, 1)[torch.tensor(ends) - length]
    total, size = 0.0, max(1, TOKENS_PER_FORWARD // length)
    with progress_bar(count, "evaluating", progress, " tokens") as bar:
        for batch, new in zip(windows.split(size), fresh.split(size), strict=True):
            kept = int(new.max())
            context = Context(decoding=DecodingContext(logits_to_keep=kept))
            if separator is not None:
                numbers = document_numbers(batch[:, :-1].cpu().numpy(), separator)
                context.documents = Documents.of(torch.from_numpy(numbers).to(ids.device))
            logits, targets = model(batch[:, :-1], context), batch[:, -kept:]
            losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none").view_as(targets)
            total += float(losses.cpu().double()[torch.arange(kept) >= kept - new[:, None]].sum())
            bar.update(int(new.sum()))
    return TextLoss(total / count, count)
