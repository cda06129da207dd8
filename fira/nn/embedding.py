"""The first and the last layer of a model: embedding of tokens, and projection to logits or loss."""

import torch
from torch import Tensor, nn

from fira.nn.base_layer import Layer
from fira.nn.context import Context
from fira.nn.dropout import Dropout
from fira.nn.lora_linear import LoraLinear
from fira.nn.projection import Projection, softcapped


class TokenTable(nn.Embedding):
    """Embedding table initialised from N(0, std²)."""

    def __init__(self, vocab_size: int, d_model: int, std: float) -> None:
        super().__init__(vocab_size, d_model)
        self.std = std

    def reset_parameters(self) -> None:
        """No-op, see `init_parameter`; on the meta device torch's version would import its compiler (two seconds)."""

    def init_parameter(self, name: str, value: Tensor, generator: torch.Generator) -> None:
        value.normal_(std=self.std, generator=generator)


class Embedding(Layer):
    """Token embedding times `scale`, plus a learned position embedding if `positions` is not 0, then dropout.

    positions: number of learned positions. std: standard deviation of the initial embeddings.
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        positions: int = 0,
        scale: float = 1.0,
        std: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.token = TokenTable(vocab_size, d_model, std)
        self.position = TokenTable(positions, d_model, std) if positions else None
        self.scale = scale
        self.dropout = Dropout(dropout, "layers.0.dropout")

    def forward(self, tokens: Tensor, context: Context) -> Tensor:
        """Tokens [B, T] int64 or vectors [B, T, d] → [B, T, d]. Raises ValueError beyond the learned positions."""
        x = tokens if tokens.is_floating_point() else self.token(tokens)
        if self.scale != 1:
            x = x * self.scale
        if self.position is not None:
            end = tokens.shape[1] + (context.decoding.cache.length if context.decoding.cache else 0)
            end -= 0 if context.starts is None else int(context.starts.min())
            if end > self.position.num_embeddings:
                raise ValueError(f"{end} tokens, the model's context is {self.position.num_embeddings}")
            x = x + self.position(context.positions(tokens).clamp(min=0))
        return self.dropout(x, context.token_keys(tokens) if self.dropout.p else None)


class Head(Layer):
    """Final norm and projection to logits, or with targets in the context to the output of the objective.

    softcap: of the logits, see `fira.nn.projection.softcapped`; 0: none.
    """

    lora_target = "head"

    def __init__(self, norm: nn.Module, project: nn.Linear, softcap: float = 0.0) -> None:
        super().__init__()
        self.norm = norm
        self.project = project
        self.softcap = softcap
        self.cast_weight: Tensor | None = None  # of `project`, in the dtype of autocast; None: cast in each call

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """[B, T, d] → logits [B, T or logits_to_keep, vocab]; with targets `Objective.output`."""
        training, kept = context.training, context.decoding.logits_to_keep
        if training.targets is None:
            return self.logits(self.norm(x if kept is None else x[:, -kept:]))
        x, weight, cast_weight = self.norm(x), self.project.weight, self.cast_weight
        if isinstance(self.project, LoraLinear):
            x, weight, cast_weight = self.project.as_one_product(x, cast_weight)
        projection = Projection(weight, cast_weight, self.softcap)
        return training.objective.output(x, projection, training.targets, training.stored)

    def logits(self, x: Tensor) -> Tensor:
        """Normalised vectors […, d] → logits […, vocab]."""
        return softcapped(self.project(x), self.softcap)
