"""blues: grouped-query attention, gated experts with noisy top-1 routing, and tied embeddings.

    x       = √d · Emb[token]
    x      += drop(RMS2(Attn(RMS1 x)))                               each block
    x      += drop(MoE(RMS3 x))
    logits  = Emb RMS x

    MoE(x)  = Σ_e p_e · RMS4(W2_e (gelu(g) ⊙ a)),  (g, a) = W1_e x   over the k experts with the largest p_e
    p       = softmax(W_r x + noise · N(0, 1))                       noise in training only

RMS4 is applied before the weight p_e. A norm after it would cancel the weight if k = 1, and the router would have no
gradient. `gate_before_norm` selects this form of the original code, RMS4(Σ_e p_e · expert_e(x)).
Attn uses rotary embedding. No biases.
"""

from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor, nn

from fira.models.family import TINY, Family, Recipe
from fira.models.family_options import Options
from fira.models.language_model import LanguageModel
from fira.nn.attention import SelfAttention
from fira.nn.base_layer import Layer
from fira.nn.context import Context
from fira.nn.dropout import Dropout
from fira.nn.embedding import Embedding, Head
from fira.nn.init import Normal
from fira.nn.mlp import relu_squared
from fira.nn.moe.aux_losses import load_balance
from fira.nn.moe.experts import GatedExperts
from fira.nn.moe.layer import MoE
from fira.nn.moe.router import Router
from fira.nn.norms import RMSNorm
from fira.nn.residual import Residual
from fira.nn.rotary import Rotary
from fira.value_types import Fraction, Layers, NotNegative, Positive, Share, Size, Tokens


@dataclass(frozen=True)
class BluesConfig(Options):
    """Hyperparameters of blues. seq_len: longest context. d_ff: width of an expert's hidden layer.

    n_kv_head: number of key and value heads. top_k: number k of experts per token, or a fraction of all experts.
    noise: standard deviation of the router's noise in training. aux_coefficient: of the loss `load_balance`.
    qk_norm: RMS-normalise queries and keys per head.
    """

    vocab_size: Tokens = 200019
    seq_len: Tokens = 256
    d_model: Size = 192
    n_head: Size = 4
    n_kv_head: Size = 2
    num_layers: Layers = 4
    d_ff: Size = 768
    num_experts: Size = 4
    top_k: Size | Share = 1
    dropout: Fraction = 0.1
    noise: NotNegative = 0.05
    rope_theta: Positive = 1e4
    norm_eps: NotNegative = 1e-5
    aux_coefficient: NotNegative = 0.01
    gate_before_norm: bool = False
    qk_norm: bool = False


class Block(Layer):
    """Attention and mixture of experts, each with a residual connection. index: position in `LanguageModel.layers`."""

    compilable = ("attend", "add_experts")

    def __init__(self, config: BluesConfig, index: int) -> None:
        super().__init__()
        c, name = config, f"layers.{index}"
        rotary = Rotary(c.d_model // c.n_head, c.rope_theta)
        self.norm1, self.norm2, self.norm3, norm4 = (RMSNorm(c.d_model, c.norm_eps) for _ in range(4))
        self.attention = SelfAttention(
            c.d_model,
            c.n_head,
            f"{name}.attention",
            Normal,
            n_kv_head=c.n_kv_head,
            qk_norm_eps=c.norm_eps if c.qk_norm else None,
            qk_norm_per_head=True,
            rotary=rotary,
            value_vocab=c.vocab_size if c.value_embeddings else None,
        )
        router = Router(
            c.d_model, c.num_experts, c.top_k, bias=False, renormalise=False, noise=c.noise, name=f"{name}.moe.router"
        )
        activation = relu_squared if c.relu_squared else F.gelu
        experts = GatedExperts(c.num_experts, c.d_model, c.d_ff, activation, std=0.02)
        losses = [(load_balance, c.aux_coefficient)]
        self.moe = MoE(router, experts, c.num_experts, index, losses, norm=None if c.gate_before_norm else norm4)
        self.norm4 = norm4 if c.gate_before_norm else nn.Identity()
        self.random = bool(c.dropout or c.noise)
        self.dropout1, self.dropout2 = (Dropout(c.dropout, f"{name}.dropout{i}") for i in (1, 2))
        self.residual1, self.residual2 = (Residual(c.residual_scalars) for _ in range(2))

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x [B, T, d] → [B, T, d]."""
        keys = context.token_keys(x) if self.random else None
        x, tokens = self.attend(x, context, keys)
        return self.add_experts(x, self.moe(tokens, context, keys), keys)

    def attend(self, x: Tensor, context: Context, keys: Tensor | None) -> tuple[Tensor, Tensor]:
        """x [B, T, d] → x + drop1(RMS2(Attn(RMS1 x))), and RMS3 of it."""
        x = self.residual1(x, self.dropout1(self.norm2(self.attention(self.norm1(x), context)), keys))
        return x, self.norm3(x)

    def add_experts(self, x: Tensor, y: Tensor, keys: Tensor | None) -> Tensor:
        """x, y [B, T, d] → x + drop2(y), with RMS4 of y if the config applies it after the weights."""
        return self.residual2(x, self.dropout2(self.norm4(y), keys))


class Blues(LanguageModel):
    """Build with a config, or with its fields: `Blues(vocab_size=…, d_model=…, …)`."""

    config: BluesConfig

    def __init__(self, config: BluesConfig | None = None, **arguments: int | float) -> None:
        c = config or BluesConfig(**arguments)  # type: ignore[arg-type]
        # With Emb from N(0, 1/d), both √d · Emb and the logits of a normalised vector have unit variance.
        embedding = Embedding(c.vocab_size, c.d_model, scale=c.d_model**0.5, std=c.d_model**-0.5)
        blocks = [Block(c, index) for index in range(1, c.num_layers + 1)]
        head = Head(RMSNorm(c.d_model, c.norm_eps), nn.Linear(c.d_model, c.vocab_size, bias=False), c.softcap)
        super().__init__(c, nn.Sequential(embedding, *blocks, head), tied=True)


FAMILY = Family(
    name="blues",
    model=Blues,
    config=BluesConfig,
    presets={
        "blues-base": BluesConfig(),
        # At this learning rate, with a coefficient of 0.01, an expert of the first layer is unused after ten steps.
        "blues-tiny": BluesConfig(
            vocab_size=2048, seq_len=128, d_model=128, d_ff=256, dropout=0.0, aux_coefficient=0.1
        ),
    },
    recipes={
        "blues-base": Recipe(steps=20_000, lr=1e-3, min_lr=1e-4, warmup=500),
        "blues-tiny": replace(TINY, embedding_lr_scale=1.0, router_lr_scale=1.0),  # the factors do not help here
    },
    tied=True,
)
