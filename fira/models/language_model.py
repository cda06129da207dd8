"""A language model is a sequence of layers: embedding, blocks, head. This is what all families share."""

from typing import Any

from torch import Tensor, nn

from fira.decoding.generate_mixin import GenerateMixin
from fira.nn.context import Context
from fira.nn.embedding import Embedding, Head
from fira.nn.init import initialise
from fira.nn.moe.layer import MoE


class LanguageModel(GenerateMixin, nn.Module):
    """`layers[0]` embeds tokens, `layers[-1]` gives logits; every layer is called as `layer(x, context)`.

    A parameter's name, `layers.3.moe.experts.w1`, is the same in every layout. `config` is the family's dataclass and
    has `vocab_size` and `seq_len`, the longest context. Built on the meta device it costs no memory and stays empty.
    tokenizer: set where a model is loaded with the one that its tokens come from.
    tied: logits are products with the embedding's own vectors. Then the head's weight is that parameter, which has one
    name, the embedding's.
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
        """Make the head's weight the embedding's, where they are to be one; also after either was replaced."""
        if self.tied:
            embedding, head = self.layers[0], self.layers[-1]
            assert isinstance(embedding, Embedding)
            assert isinstance(head, Head)
            head.project.weight = embedding.token.weight

    def forward(self, tokens: Tensor, context: Context | None = None) -> Tensor:
        """[B, T] int64 → logits [B, T, vocab]. In train mode, without a context, dropout uses torch's generator."""
        context = context or Context.for_tokens(tokens, self.training)
        x = tokens
        for layer in self.layers:
            x = layer(x, context)
        if context.decoding.cache is not None:
            context.decoding.cache.length += tokens.shape[1]
        return x

    def weights(self) -> dict[str, Tensor]:
        """All that a checkpoint holds of the model, by global name: parameters and buffers, tied ones once."""
        return {**dict(self.named_parameters()), **dict(self.named_buffers())}

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def num_active_parameters(self) -> int:
        """How many parameters take part for one token: of the experts only those that it chooses."""
        idle = 0
        for moe in self.modules():
            if isinstance(moe, MoE):
                one_expert = sum(p[0].numel() for p in moe.experts.parameters())
                idle += one_expert * (moe.num_experts - moe.router.top_k)
        return self.num_parameters() - idle
