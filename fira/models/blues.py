"""blues: grouped queries, gated experts, noisy top-1 routing, norms on both sides, tied embeddings.

    x₀ = Emb · √d       h = x + drop(RMS(Attn(RMS x)))      y = h + drop(MoE(RMS h))
    MoE(x) = Σ_e p_e · RMS(W2_e (gelu(g) ⊙ a)),  (g, a) = W1_e x        p = the top-k of softmax(W x + noise)

The router's weight p_e multiplies the normed output: a norm takes away any factor before it, and with it the gradient
that tells the router of its choices. `gate_before_norm` gives the public form, RMS(Σ_e p_e · expert_e(x)).
Rotary positions, a final RMS norm, logits through the embedding, no biases.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from fira.models.family import Family, Recipe
from fira.models.language_model import LanguageModel
from fira.nn.attention import SelfAttention
from fira.nn.base_layer import Layer
from fira.nn.context import Context
from fira.nn.dropout import Dropout
from fira.nn.embedding import Embedding, Head
from fira.nn.init import Normal
from fira.nn.moe.aux_losses import load_balance
from fira.nn.moe.experts import GatedExperts
from fira.nn.moe.layer import MoE
from fira.nn.moe.router import Router
from fira.nn.norms import RMSNorm
from fira.nn.rotary import Rotary


@dataclass(frozen=True)
class BluesConfig:
    """The shape of a blues. seq_len: the longest context. noise: deviation of the router's noise while training."""

    vocab_size: int = 200019
    seq_len: int = 256
    d_model: int = 192
    n_head: int = 4
    n_kv_head: int = 2
    num_layers: int = 4
    d_ff: int = 768
    num_experts: int = 4
    top_k: int | float = 1
    dropout: float = 0.1
    noise: float = 0.05
    rope_theta: float = 1e4
    norm_eps: float = 1e-5
    aux_coefficient: float = 0.01
    gate_before_norm: bool = False


class Block(Layer):
    """Attention, then experts, each between two norms in a residual branch. index: its place among the layers."""

    def __init__(self, config: BluesConfig, index: int) -> None:
        super().__init__()
        c, name = config, f"layers.{index}"
        rotary = Rotary(c.d_model // c.n_head, c.rope_theta)
        self.norm1, self.norm2, self.norm3, norm4 = (RMSNorm(c.d_model, c.norm_eps) for _ in range(4))
        self.attention = SelfAttention(
            c.d_model, c.n_head, f"{name}.attention", Normal, n_kv_head=c.n_kv_head, rotary=rotary
        )
        router = Router(
            c.d_model, c.num_experts, c.top_k, bias=False, renormalise=False, noise=c.noise, name=f"{name}.moe.router"
        )
        experts = GatedExperts(c.num_experts, c.d_model, c.d_ff, F.gelu, std=0.02)
        losses = [(load_balance, c.aux_coefficient)]
        self.moe = MoE(router, experts, c.num_experts, index, losses, norm=None if c.gate_before_norm else norm4)
        self.norm4 = norm4 if c.gate_before_norm else nn.Identity()
        self.dropout1, self.dropout2 = (Dropout(c.dropout, f"{name}.dropout{i}") for i in (1, 2))

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """[B, T, d] → [B, T, d]."""
        keys = context.token_keys(x)
        x = x + self.dropout1(self.norm2(self.attention(self.norm1(x), context)), keys)
        return x + self.dropout2(self.norm4(self.moe(self.norm3(x), context, keys)), keys)


class Blues(LanguageModel):
    """`Blues(vocab_size=…, d_model=…, …)`, as in BluesConfig."""

    config: BluesConfig

    def __init__(self, config: BluesConfig | None = None, **arguments: int | float) -> None:
        c = config or BluesConfig(**arguments)  # type: ignore[arg-type]
        # From N(0, 1/d): √d times it has unit variance, and so have the logits of a normed vector.
        embedding = Embedding(c.vocab_size, c.d_model, scale=c.d_model**0.5, std=c.d_model**-0.5)
        blocks = [Block(c, index) for index in range(1, c.num_layers + 1)]
        head = Head(RMSNorm(c.d_model, c.norm_eps), nn.Linear(c.d_model, c.vocab_size, bias=False))
        super().__init__(c, nn.Sequential(embedding, *blocks, head), tied=True)


FAMILY = Family(
    name="blues",
    model=Blues,
    config=BluesConfig,
    presets={
        "blues-base": BluesConfig(),
        # With a coefficient of 0.01 the first layer loses an expert in ten steps of so high a learning rate.
        "blues-tiny": BluesConfig(
            vocab_size=2048, seq_len=128, d_model=128, d_ff=256, dropout=0.0, aux_coefficient=0.1
        ),
    },
    recipes={
        "blues-base": Recipe(steps=20_000, lr=1e-3, min_lr=1e-4, warmup=500),
        "blues-tiny": Recipe(steps=200, lr=6e-3, min_lr=3e-4, warmup=20, batch_size=32),
    },
    tied=True,
)
