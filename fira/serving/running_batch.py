"""Continuous batching: texts join and leave a running batch between any two steps of decoding.

step          1    2    3    4    5    6
text 0        ●    ●    ●    ●    ●    ●        ●  token that the batch decodes
text 1        ○    ○    ●    ●    ●             ○  piece of a prompt, in another forward pass
text 2                       ○    ●    ●
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fira.models.language_model import LanguageModel
from fira.nn.context import Context, DecodingContext
from fira.nn.kv_cache import KVCache
from fira.nn.moe.layer import MoE
from fira.nn.moe.router import Routed
from fira.serving.batch_cache import BatchCache
from fira.serving.row_sampling import RowSampler, next_tokens


@dataclass(eq=False)
class Text:
    """A prompt and its continuation.

    tokens: all tokens so far. experts: number of assignments [E] of its generated tokens to each expert by layer
    number; None: not counted.
    """

    tokens: list[int]
    sampler: RowSampler
    experts: dict[int, Tensor] | None = None
    cache: KVCache | None = field(default_factory=KVCache)  # of the prompt, until the text joins the batch

    @property
    def length_read(self) -> int:
        """Number of tokens of the prompt that have been processed, before the text joins the batch."""
        assert self.cache is not None
        return self.cache.length


class RunningBatch:
    """A batch of at most `rows` texts. A text equals its continuation alone, apart from rounding errors.

    A text of t tokens can be continued while t is at most `seq_len`; the caller removes it before.
    """

    def __init__(self, model: LanguageModel, rows: int) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self._rows = rows
        self.clear()
        self._counted: Sequence[Text] = ()  # the texts of the current step
        for moe in model.modules():
            if isinstance(moe, MoE):
                moe.router.register_forward_hook(self._counter(moe))

    def clear(self) -> None:
        """Remove all texts."""
        self.cache = BatchCache(self._rows, self.model.config.seq_len)
        self.texts: list[Text] = []

    @torch.inference_mode()
    def read_prompt(self, text: Text, limit: int) -> int | None:
        """Process at most `limit` further tokens of a prompt. After the last one, return the first new token."""
        assert text.cache is not None
        piece = text.tokens[text.length_read : text.length_read + limit]
        logits = self.model(torch.tensor([piece], device=self.device), self._context(text.cache, [0]))[:, -1]
        if text.length_read < len(text.tokens):
            return None
        return self._choose([text], logits)[0]

    @torch.inference_mode()
    def read_prompts(self, texts: Sequence[Text]) -> list[int]:
        """Process whole prompts together. Return the first new token of each."""
        longest = max(len(text.tokens) for text in texts)
        starts = [longest - len(text.tokens) for text in texts]
        padded = [[0] * start + text.tokens for start, text in zip(starts, texts, strict=True)]
        cache = KVCache()
        logits = self.model(torch.tensor(padded, device=self.device), self._context(cache, starts))[:, -1]
        for row, text in enumerate(texts):
            text.cache = cache.row(row, len(text.tokens))
        return self._choose(texts, logits)

    def _context(self, cache: KVCache, starts: list[int]) -> Context:
        """Context of a forward pass whose rows begin with `starts` columns of padding."""
        return Context(
            starts=torch.tensor(starts, device=self.device) if any(starts) else None,
            decoding=DecodingContext(cache, logits_to_keep=1),
        )

    @torch.inference_mode()
    def join(self, text: Text) -> None:
        """Add a text to the batch, whose prompt has been read."""
        assert text.cache is not None
        self.cache.join(text.cache)
        text.cache = None
        self.texts.append(text)

    @torch.inference_mode()
    def leave(self, text: Text) -> None:
        """Remove a text from the batch."""
        row = self.texts.index(text)
        self.cache.leave(row)
        self.texts[row] = self.texts[-1]
        del self.texts[-1]

    @torch.inference_mode()
    def step(self) -> list[int]:
        """Decode one token of every text; return them in the order of `texts`."""
        last = torch.tensor([text.tokens[-1:] for text in self.texts], device=self.device)
        context = self._context(self.cache, self.cache.starts())
        self._counted = self.texts
        try:
            logits = self.model(last, context)[:, -1]
        finally:
            self._counted = ()
        return self._choose(self.texts, logits)

    def _choose(self, texts: Sequence[Text], logits: Tensor) -> list[int]:
        tokens = next_tokens([text.sampler for text in texts], [text.tokens for text in texts], logits.float())
        for text, token in zip(texts, tokens, strict=True):
            text.tokens.append(token)
        return tokens

    def _counter(self, moe: MoE) -> Callable[..., None]:
        """A hook that adds the experts of each decoded token to the counts of its text, if the text has them."""

        def count(router: object, inputs: object, routed: Routed) -> None:
            for row, text in enumerate(self._counted):
                if text.experts is not None:
                    counts = routed.experts[row].bincount(minlength=moe.num_experts)
                    text.experts[moe.index] = counts + text.experts.get(moe.index, 0)

        return count
