"""A language model is a sequence of layers: embedding, blocks, head. This is what all families share."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fira.generation.sampling import sample
from fira.models.context import Context, KVCache
from fira.models.init import initialise


class LanguageModel(nn.Module):
    """`layers[0]` embeds tokens, `layers[-1]` gives logits; every layer is called as `layer(x, context)`.

    A parameter's name, `layers.3.moe.experts.w1`, is the same in every layout. `config` is the family's dataclass and
    has `vocab_size` and `seq_len`, the longest context. Built on the meta device it costs no memory and stays empty.
    """

    def __init__(self, config: Any, layers: nn.Sequential, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.layers = layers
        if next(self.parameters()).device.type != "meta":
            for index, layer in enumerate(layers):
                initialise(layer, f"layers.{index}", seed)

    def forward(self, tokens: Tensor, context: Context | None = None) -> Tensor:
        """[B, T] int64 → logits [B, T, vocab]. In train mode, without a context, dropout uses torch's generator."""
        if context is None:
            keys = torch.randint(2**62, (len(tokens),), device=tokens.device) if self.training else None
            context = Context(keys=keys)
        x = tokens
        for layer in self.layers:
            x = layer(x, context)
        if context.cache is not None:
            context.cache.length += tokens.shape[1]
        return x

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    @torch.no_grad()
    def generate(
        self,
        ids: Sequence[int] | Tensor,
        max_new_tokens: int = 100,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos: int | None = None,
        seed: int | None = None,
        use_cache: bool = True,
    ) -> list[int] | Tensor:
        """Continue a prompt; returns prompt and continuation as what was given: a list, or a tensor [T] or [B, T].

        temperature 0 is greedy. eos: stop once every sequence has produced it. A prompt longer than the model's
        context keeps its last tokens. use_cache=False computes every token from scratch and gives the same.
        """
        device = next(self.parameters()).device
        tokens = torch.as_tensor(ids, dtype=torch.int64, device=device)
        shape = tokens.dim()
        tokens = torch.atleast_2d(tokens)
        if tokens.shape[1] == 0:
            raise ValueError("generation needs at least one token to start from")
        if int(tokens.min()) < 0 or int(tokens.max()) >= self.config.vocab_size:
            raise ValueError(f"a token is outside the vocabulary of {self.config.vocab_size}")
        generator = None if seed is None else torch.Generator(device).manual_seed(seed)
        was_training = self.training
        self.eval()
        cache: KVCache | None = None
        finished = torch.zeros(len(tokens), dtype=torch.bool, device=device)
        for _ in range(max_new_tokens):
            window = tokens[:, -self.config.seq_len :]
            if cache is None or tokens.shape[1] > self.config.seq_len:
                # Learned positions: once the window slides, every token's position changes and nothing can be reused.
                cache = KVCache()
                logits = self(window, Context(cache=cache if use_cache else None))
            else:
                logits = self(tokens[:, cache.length :], Context(cache=cache))
            cache = cache if use_cache else None
            new = sample(logits[:, -1].float(), temperature, top_k, top_p, generator)
            if eos is not None:
                new = new.masked_fill(finished, eos)
                finished |= new == eos
            tokens = torch.cat([tokens, new[:, None]], dim=1)
            if eos is not None and bool(finished.all()):
                break
        self.train(was_training)
        tokens = tokens if shape == 2 else tokens[0]
        return tokens if isinstance(ids, Tensor) else tokens.tolist()
