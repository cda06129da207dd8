"""Base class of all model families: a sequence of layers, from embedding over blocks to head."""

from typing import Any

from torch import Tensor, nn

from fira.decoding.generate_mixin import GenerateMixin
from fira.nn.context import Context
from fira.nn.embedding import Embedding, Head
from fira.nn.init import initialise
from fira.nn.moe.layer import MoE


class LanguageModel(GenerateMixin, nn.Module):
    """Language model with `layers[0]` the embedding and `layers[-1]` the head; each is called as `layer(x, context)`.

    A parameter's name, such as `layers.3.moe.experts.w1`, is the same in every layout. On the meta device the model has
    no weights.

    config: dataclass of the family, with the fields `vocab_size` and `seq_len`, the longest context.
    seed: with a parameter's name, it determines the initial values.
    tied: the head shares the embedding's weight. The parameter is listed once, under the embedding's name.
    tokenizer: attribute that is set if the model is loaded together with a tokenizer.
    """

    def __init__(self, config: Any, layers: nn.Sequential, seed: int = 0, tied: bool = False) -> None:
        super().__init__()
        self.config = config
        self.layers = layers
        self.tied = tied
        self.tokenizer: Any = None
        if next(self.parameters()).device.type != "meta":
            for index, layer in enumerate(layers):
                initialise(layer, f"layers.{index}", seed)
        self.tie()

    def tie(self) -> None:
        """Share the embedding's weight with the head if the model is tied. Call it after one of them was replaced."""
        if self.tied:
            embedding, head = self.layers[0], self.layers[-1]
            assert isinstance(embedding, Embedding)
            assert isinstance(head, Head)
            head.project.weight = embedding.token.weight

    def forward(self, tokens: Tensor, context: Context | None = None) -> Tensor:
        """tokens [B, T] int64 → logits [B, T, vocab]. Without a context, torch's generator seeds dropout."""
        context = context or Context.for_tokens(tokens, self.training)
        x = tokens
        for layer in self.layers:
            x = layer(x, context)
        if context.decoding.cache is not None:
            context.decoding.cache.length += tokens.shape[1]
        return x

    def weights(self) -> dict[str, Tensor]:
        """Parameters and buffers by global name, as stored in a checkpoint. A tied parameter is listed once."""
        return {**dict(self.named_parameters()), **dict(self.named_buffers())}

    def num_parameters(self) -> int:
        """Total number of parameters."""
        return sum(p.numel() for p in self.parameters())

    def num_active_parameters(self) -> int:
        """Number of parameters that are used for one token, with k experts per MoE layer."""
        unused = 0
        for moe in self.modules():
            if isinstance(moe, MoE):
                one_expert = sum(p[0].numel() for p in moe.experts.parameters())
                unused += one_expert * (moe.num_experts - moe.router.top_k)
        return self.num_parameters() - unused
