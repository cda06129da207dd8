"""The method `generate` of language models."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fira.decoding.decoding import CausalModel, continuation
from fira.decoding.sampling import Sampling


class GenerateMixin:
    """Adds `generate` to a `CausalModel`."""

    def generate(
        self: CausalModel,
        ids: Sequence[int] | Sequence[Sequence[int]] | Tensor,
        max_new_tokens: int = 100,
        eos: int | None = None,
        use_cache: bool = True,
        **sampling: Any,
    ) -> list[int] | list[list[int]] | Tensor:
        """Continue one or several prompts; returns prompts and continuations in the type of `ids`.

        ids: a list of tokens, a list of such lists, or a tensor [T] or [B, T].
        eos: token that ends a sequence. If the result is a tensor, shorter rows are padded with it.
        use_cache: keep keys, values and states; False recomputes all tokens at each step, with the same result.
        sampling: temperature (0: greedy), top_k, top_p, seed and the other fields of `fira.decoding.sampling.Sampling`.

        Of texts longer than the model's context, the last tokens are used. Raises UserError if a prompt is empty or
        contains a token outside the vocabulary, or if an option is out of range.
        """
        batched = ids.dim() == 2 if isinstance(ids, Tensor) else any(hasattr(prompt, "__len__") for prompt in ids)
        rows: list[Any] = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        texts = [list(row) for row in (rows if batched else [rows])]
        prompts = [tuple(text) for text in texts]
        for new in continuation(self, prompts, max_new_tokens, Sampling(**sampling), eos, use_cache):
            for row, token in new.items():
                texts[row].append(token)
        if not isinstance(ids, Tensor):
            return texts if batched else texts[0]
        longest = max(map(len, texts))
        padded = torch.tensor([text + [eos or 0] * (longest - len(text)) for text in texts], device=ids.device)
        return padded if batched else padded[0]
