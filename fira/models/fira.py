"""fira: a decoder transformer with a mixture of experts in every block.

    x       = drop(Emb[token] + Pos[position])
    x      += drop1(Attn(LN1 x))                                         each block
    x      += drop3(LN_post(drop2(MoE(LN2 x))))
    logits  = W LN x

    MoE(x)  = Σ_e p_e · (W2_e drop(gelu(W1_e x + b1_e)) + b2_e)          over the k experts with the largest g_e
    p       = softmax of the k largest g,  g = (W_g x + b_g) / 0.9

Attn: multi-head attention with biases.
"""

from dataclasses import dataclass

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
from fira.nn.init import Xavier
from fira.nn.mlp import relu_squared
from fira.nn.moe.aux_losses import even_weights, load_balance, router_z
from fira.nn.moe.experts import Experts
from fira.nn.moe.layer import MoE
from fira.nn.moe.router import Router
from fira.nn.residual import Residual
from fira.value_types import Fraction, Layers, NotNegative, Share, Size, Tokens


@dataclass(frozen=True)
class FiraConfig(Options):
    """Hyperparameters of fira. seq_len: longest context. d_ff: width of an expert's hidden layer.

    top_k: number k of experts per token, or a fraction of all experts.
    aux_coefficient, switch_coefficient, z_coefficient: of the losses `even_weights`, `load_balance` and `router_z`.
    noise, balance_rate: see Router. capacity_factor: see MoE. qk_norm: RMS-normalise queries and keys per head.
    """

    vocab_size: Tokens = 50304
    seq_len: Tokens = 512
    d_model: Size = 768
    n_head: Size = 12
    num_layers: Layers = 12
    d_ff: Size = 3072
    num_experts: Size = 4
    top_k: Size | Share = 2
    dropout: Fraction = 0.1
    aux_coefficient: NotNegative = 1.0
    switch_coefficient: NotNegative = 0.0
    z_coefficient: NotNegative = 0.0
    noise: NotNegative = 0.0
    balance_rate: NotNegative = 0.0
    capacity_factor: NotNegative = 0.0
    qk_norm: bool = False


class Block(Layer):
    """Attention and mixture of experts, each with a residual connection. index: position in `LanguageModel.layers`."""

    compilable = ("attend", "add_experts")

    def __init__(self, config: FiraConfig, index: int) -> None:
        super().__init__()
        c, name = config, f"layers.{index}"
        self.norm1 = nn.LayerNorm(c.d_model)
        self.attention = SelfAttention(
            c.d_model,
            c.n_head,
            f"{name}.attention",
            Xavier,
            bias=True,
            qk_norm_eps=self.norm1.eps if c.qk_norm else None,
            qk_norm_per_head=True,
            value_vocab=c.vocab_size if c.value_embeddings else None,
        )
        self.norm2 = nn.LayerNorm(c.d_model)
        router = Router(
            c.d_model,
            c.num_experts,
            c.top_k,
            temperature=0.9,
            noise=c.noise,
            balance_rate=c.balance_rate,
            name=f"{name}.moe.router",
        )
        activation = relu_squared if c.relu_squared else F.gelu
        experts = Experts(c.num_experts, c.d_model, c.d_ff, c.dropout, f"{name}.moe.experts", activation)
        losses = [(even_weights, c.aux_coefficient), (load_balance, c.switch_coefficient), (router_z, c.z_coefficient)]
        self.moe = MoE(router, experts, c.num_experts, index, losses, capacity_factor=c.capacity_factor)
        self.post_norm = nn.LayerNorm(c.d_model)
        self.random = bool(c.dropout or c.noise)
        self.dropout1, self.dropout2, self.dropout3 = (Dropout(c.dropout, f"{name}.dropout{i}") for i in (1, 2, 3))
        self.residual1, self.residual2 = (Residual(c.residual_scalars) for _ in range(2))

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x [B, T, d] → [B, T, d]."""
        keys = context.token_keys(x) if self.random else None
        x, tokens = self.attend(x, context, keys)
        return self.add_experts(x, self.moe(tokens, context, keys), keys)

    def attend(self, x: Tensor, context: Context, keys: Tensor | None) -> tuple[Tensor, Tensor]:
        """x [B, T, d] → x + drop1(Attn(LN1 x)), and LN2 of it."""
        x = self.residual1(x, self.dropout1(self.attention(self.norm1(x), context), keys))
        return x, self.norm2(x)

    def add_experts(self, x: Tensor, y: Tensor, keys: Tensor | None) -> Tensor:
        """x, y [B, T, d] → x + drop3(LN_post(drop2 y))."""
        return self.residual2(x, self.dropout3(self.post_norm(self.dropout2(y, keys)), keys))


class FIRA(LanguageModel):
    """Build with a config, or with its fields: `FIRA(vocab_size=…, d_model=…, …)`."""

    config: FiraConfig

    def __init__(self, config: FiraConfig | None = None, **arguments: int | float) -> None:
        c = config or FiraConfig(**arguments)  # type: ignore[arg-type]
        embedding = Embedding(c.vocab_size, c.d_model, positions=c.seq_len, dropout=c.dropout)
        blocks = [Block(c, index) for index in range(1, c.num_layers + 1)]
        head = Head(nn.LayerNorm(c.d_model), Xavier(c.d_model, c.vocab_size, bias=False), c.softcap)
        super().__init__(c, nn.Sequential(embedding, *blocks, head))


FAMILY = Family(
    name="fira",
    model=FIRA,
    config=FiraConfig,
    presets={
        "fira-base": FiraConfig(),
        "fira-tiny": FiraConfig(
            vocab_size=2048,
            seq_len=128,
            d_model=128,
            n_head=4,
            num_layers=4,
            d_ff=256,
            dropout=0.0,
            value_embeddings=True,
        ),
    },
    recipes={
        "fira-base": Recipe(steps=20_000, lr=6e-4, min_lr=5e-5, warmup=700),
        "fira-tiny": TINY,
    },
)
