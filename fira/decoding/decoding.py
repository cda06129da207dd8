"""Autoregressive decoding of a batch of prompts.

Shapes: B prompts of different lengths, T tokens so far, V vocabulary. All rows are decoded from the end of the shortest
prompt. A row whose prompt is longer keeps its own tokens until its prompt ends:

    column       0   1   2   3   4   5
    row 0        p   p   ●   ●   ●   ●        p  token of the prompt
    row 1        p   p   p   p   ●   ●        ●  generated token
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from fira.decoding.sampler import Sampler, draw, make_generators
from fira.decoding.sampling import Sampling
from fira.errors import UserError
from fira.nn.context import Context, DecodingContext
from fira.nn.kv_cache import KVCache


class CausalModel(Protocol):
    """Interface that decoding requires of a model. The config has the fields `seq_len` and `vocab_size`."""

    config: Any

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def __call__(self, tokens: Tensor, context: Context) -> Tensor: ...


class Reader:
    """Computes logits for a growing batch of texts of equal length, without recomputing cached tokens."""

    def __init__(self, model: CausalModel, use_cache: bool = True) -> None:
        self.model = model
        self.seq_len: int = model.config.seq_len
        self.cache = KVCache() if use_cache else None

    def logits(self, tokens: Tensor, last: int = 1) -> Tensor:
        """All tokens so far [B, T] → logits [B, last, V] of the last positions, in fp32."""
        if self.cache is None or tokens.shape[1] > self.seq_len:
            # The window slides, which changes the position of every token: the cache is not valid.
            tokens, cache = tokens[:, -self.seq_len :], None
        else:
            tokens, cache = tokens[:, self.cache.length :], self.cache
        return self.model(tokens, Context(decoding=DecodingContext(cache, logits_to_keep=last))).float()

    def keep(self, length: int) -> None:
        """Shorten the cache to `length` tokens. Raises UserError if a recurrent state or a window prevents it."""
        if self.cache is not None and self.cache.length > length:
            try:
                self.cache.crop(length)
            except ValueError as error:
                raise UserError(f"tokens cannot be removed ({error}); generate without a draft") from None


def check_prompt(model: CausalModel, prompt: Sequence[int]) -> None:
    """Raise UserError if a prompt is empty or contains a token outside the model's vocabulary."""
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
    """Generate the tokens that follow each prompt; yields at each step the new tokens by row.

    A row ends after `max_new_tokens` tokens or after the token `eos`. The tokens of a row do not depend on the other
    rows. use_cache=False recomputes all tokens at each step.

    Raises UserError if a prompt is empty or contains a token outside the model's vocabulary.
    """
    for prompt in prompts:
        check_prompt(model, prompt)
    device = next(model.parameters()).device
    sampler, generators = Sampler(sampling), make_generators(sampling, len(prompts), device)
    rows = [torch.tensor(prompt, device=device) for prompt in prompts]
    tokens = pad_sequence(rows, batch_first=True) if rows else torch.empty(0, 0)
    running = list(range(len(rows))) if max_new_tokens > 0 else []
    reader, length = Reader(model, use_cache), min(map(len, rows), default=0)
    while running:
        logits = reader.logits(tokens[:, :length])[:, -1]
        if length == tokens.shape[1]:
            tokens = F.pad(tokens, (0, length))  # the logits of finished rows are ignored
        ready = [row for row in running if len(rows[row]) <= length]
        if ready:
            selected = slice(None) if len(ready) == len(rows) else ready
            if sampler.greedy:
                chosen = logits[selected].argmax(-1)
            else:
                streams = generators and [generators[row] for row in ready]
                chosen = draw(sampler.probabilities(tokens[selected, :length], logits[selected]), streams)
            tokens[selected, length] = chosen
            new = dict(zip(ready, chosen.tolist(), strict=True))
            ended = {row for row in ready if new[row] == eos or length + 1 == len(rows[row]) + max_new_tokens}
            running = [row for row in running if row not in ended]
            yield new
        length += 1
