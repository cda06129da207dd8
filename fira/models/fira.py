"""fira, the flagship: a decoder transformer with a mixture of experts in every block.

    h = x + drop(MHA(LN x))        y = h + drop(MoE(LN h))
    MoE(x) = LN(drop(Σ_e p_e · W2_e drop(gelu(W1_e x + b1_e)) + b2_e))     p = softmax of the top-k of (W x + b) / 0.9

Learned token and position embeddings, a final LayerNorm, an untied head without bias.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fira.models.attention import SelfAttention
from fira.models.context import Context
from fira.models.dropout import Dropout, token_keys
from fira.models.init import Xavier
from fira.models.language_model import LanguageModel
from fira.models.moe import Experts, MoE, Router


@dataclass(frozen=True)
class FiraConfig:
    """The shape of a fira. top_k: experts per token, or a fraction of them. seq_len: the longest context."""

    vocab_size: int = 50304
    seq_len: int = 512
    d_model: int = 768
    n_head: int = 12
    num_layers: int = 12
    d_ff: int = 3072
    num_experts: int = 4
    top_k: int | float = 2
    dropout: float = 0.1
    aux_coefficient: float = 1.0


PRESETS = {
    "fira-base": FiraConfig(),
    "fira-tiny": FiraConfig(vocab_size=2048, seq_len=128, d_model=128, n_head=4, num_layers=4, d_ff=256, dropout=0.0),
}

# Steps, peak and final learning rate, warm-up steps.
RECIPES = {"fira-base": (20_000, 6e-4, 5e-5, 700), "fira-tiny": (400, 3e-3, 3e-4, 20)}


class Embedding(nn.Module):
    """Token plus position."""

    def __init__(self, config: FiraConfig) -> None:
        super().__init__()
        self.token = nn.Embedding(config.vocab_size, config.d_model)
        self.position = nn.Embedding(config.seq_len, config.d_model)
        self.dropout = Dropout(config.dropout, "layers.0.dropout")

    def forward(self, tokens: Tensor, context: Context) -> Tensor:
        """[B, T] int64 → [B, T, d]."""
        start = context.cache.length if context.cache else 0
        if start + tokens.shape[1] > self.position.num_embeddings:
            raise ValueError(f"{start + tokens.shape[1]} tokens, the model's context is {self.position.num_embeddings}")
        positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        return self.dropout(self.token(tokens) + self.position(positions), _row_keys(tokens, context))

    def flops_per_token(self, length: int) -> float:
        return 0.0


class Block(nn.Module):
    """Pre-norm attention, then pre-norm experts, each in a residual branch. index: its place among the layers."""

    def __init__(self, config: FiraConfig, index: int) -> None:
        super().__init__()
        self.config = config
        self.norm1 = nn.LayerNorm(config.d_model)
        self.attention = SelfAttention(config.d_model, config.n_head, index)
        self.norm2 = nn.LayerNorm(config.d_model)
        name = f"layers.{index}"
        router = Router(config.d_model, config.num_experts, config.top_k)
        experts = Experts(config.num_experts, config.d_model, config.d_ff, config.dropout, f"{name}.moe.experts")
        self.moe = MoE(router, experts, config.num_experts, index, config.aux_coefficient)
        self.post_norm = nn.LayerNorm(config.d_model)
        self.dropout1, self.dropout2, self.dropout3 = (Dropout(config.dropout, f"{name}.dropout{i}") for i in (1, 2, 3))

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """[B, T, d] → [B, T, d]."""
        keys = _row_keys(x, context)
        x = x + self.dropout1(self.attention(self.norm1(x), context.cache), keys)
        y = self.moe(self.norm2(x), context, keys)
        return x + self.dropout3(self.post_norm(self.dropout2(y, keys)), keys)

    def flops_per_token(self, length: int) -> float:
        c = self.config
        attention = self.attention.flops_per_token(c.d_model, length)
        return attention + self.moe.flops_per_token(c.d_model, c.d_ff, c.num_experts, self.moe.router.top_k)


class Head(nn.Module):
    """Final norm and projection to logits."""

    def __init__(self, config: FiraConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.d_model)
        self.project = Xavier(config.d_model, config.vocab_size, bias=False)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """[B, T, d] → [B, T, vocab]."""
        return self.project(self.norm(x))

    def flops_per_token(self, length: int) -> float:
        return 2.0 * self.project.in_features * self.project.out_features


def _row_keys(x: Tensor, context: Context) -> Tensor | None:
    """The dropout keys of x's tokens. Dropout is for training, where there is no cache and positions start at zero."""
    return None if context.keys is None else token_keys(context.keys, 0, x.shape[1])


class FIRA(LanguageModel):
    """`FIRA(vocab_size=…, d_model=…, n_head=…, num_layers=…, d_ff=…, num_experts=…)`, as in FiraConfig."""

    config: FiraConfig

    def __init__(self, config: FiraConfig | None = None, **arguments: int | float) -> None:
        config = config or FiraConfig(**arguments)  # type: ignore[arg-type]
        blocks = [Block(config, index) for index in range(1, config.num_layers + 1)]
        super().__init__(config, nn.Sequential(Embedding(config), *blocks, Head(config)))
