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
        """Continue a prompt, or several; returns prompt and continuation as what was given.

        ids: a list, lists of any lengths, or a tensor [T] or [B, T]. eos: a sequence ends once it has produced it,
        which fills up a tensor's shorter rows. sampling: temperature (0 is greedy), top_k, top_p, seed and the other
        fields of `fira.decoding.sampling.Sampling`. A prompt longer than the model's context keeps its last tokens.
        use_cache=False computes every token from scratch and gives the same. Raises UserError where a prompt is empty
        or outside the vocabulary, or a number is out of range.
        """
        several = ids.dim() == 2 if isinstance(ids, Tensor) else any(hasattr(one, "__len__") for one in ids)
        rows: list[Any] = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        texts = [list(row) for row in (rows if several else [rows])]
        chosen = Sampling(**sampling)
        for new in continuation(self, list(map(tuple, texts)), max_new_tokens, chosen, eos, use_cache):
            for row, token in new.items():
                texts[row].append(token)
        if not isinstance(ids, Tensor):
            return texts if several else texts[0]
        longest = max(map(len, texts))
        filled = torch.tensor([text + [eos or 0] * (longest - len(text)) for text in texts], device=ids.device)
        return filled if several else filled[0]
