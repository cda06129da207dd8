"""Tokens one after another."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from fira.decoding.sampling import Sampler, Sampling, draw
from fira.errors import UserError
from fira.nn.context import Context, DecodingContext
from fira.nn.kv_cache import KVCache


class CausalModel(Protocol):
    """What decoding needs of a model: a config with `seq_len` and `vocab_size`, parameters, and logits of a context."""

    config: Any

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def __call__(self, tokens: Tensor, context: Context) -> Tensor: ...


class Reader:
    """A model on its way through a batch of texts of one length, which computes what is not in its cache yet."""

    def __init__(self, model: CausalModel, use_cache: bool = True) -> None:
        self.model = model
        self.seq_len: int = model.config.seq_len
        self.cache = KVCache() if use_cache else None

    def logits(self, tokens: Tensor, last: int = 1) -> Tensor:
        """tokens: [B, T], all of the texts → logits [B, last, V] after their last tokens."""
        if self.cache is None or tokens.shape[1] > self.seq_len:
            # Positions are counted from the window's start: once it slides, nothing can be reused.
            tokens, cache = tokens[:, -self.seq_len :], None
        else:
            tokens, cache = tokens[:, self.cache.length :], self.cache
        return self.model(tokens, Context(decoding=DecodingContext(cache, logits_to_keep=last))).float()

    def keep(self, length: int) -> None:
        """Forget all tokens but the first `length`. UserError for a model whose state cannot go back."""
        if self.cache is not None and self.cache.length > length:
            try:
                self.cache.crop(length)
            except ValueError as error:
                raise UserError(f"this model cannot take tokens back ({error}); generate without a draft") from None


def check_prompt(model: CausalModel, prompt: Sequence[int]) -> None:
    """UserError for a prompt that is empty or not of the model's vocabulary."""
    size = model.config.vocab_size
    if not len(prompt):
        raise UserError("there is nothing to continue; give at least one token")
    if min(prompt) < 0 or max(prompt) >= size:
        raise UserError(f"the prompt has a token outside the model's vocabulary of {size}; use its tokenizer")


@torch.inference_mode()
def continuation(
    model: CausalModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    eos: int | None = None,
    use_cache: bool = True,
) -> Iterator[dict[int, int]]:
    """The tokens that follow prompts, as soon as they are known: each time a token for some of the rows, by row.

    A row ends after `max_new_tokens` or after `eos`. Prompts may differ in length, and each is continued as it is
    alone: all begin together, and a row reads on in its prompt while shorter ones are being continued.
    """
    for prompt in prompts:
        check_prompt(model, prompt)
    device = next(model.parameters()).device
    sampler, generators = Sampler(sampling), sampling.generators(len(prompts), device)
    rows = [torch.tensor(prompt, device=device) for prompt in prompts]
    tokens = pad_sequence(rows, batch_first=True) if rows else torch.empty(0, 0)
    running = list(range(len(rows))) if max_new_tokens > 0 else []
    reader, length = Reader(model, use_cache), min(map(len, rows), default=0)
    while running:
        logits = reader.logits(tokens[:, :length])[:, -1]
        if length == tokens.shape[1]:
            tokens = F.pad(tokens, (0, length))  # a row that has ended is read on, and its logits ignored
        ready = [row for row in running if len(rows[row]) <= length]
        if ready:
            at = slice(None) if len(ready) == len(rows) else ready
            if sampler.likeliest:
                chosen = logits[at].argmax(-1)
            else:
                streams = generators and [generators[row] for row in ready]
                chosen = draw(sampler.probabilities(tokens[at, :length], logits[at]), streams)
            tokens[at, length] = chosen
            new = dict(zip(ready, chosen.tolist(), strict=True))
            ended = {row for row in ready if new[row] == eos or length + 1 == len(rows[row]) + max_new_tokens}
            running = [row for row in running if row not in ended]
            yield new
        length += 1
