"""mooshak: a dense, Llama-like decoder for Hindi and English.

    x       = Emb[token]
    h       = x + Attn(RMS1 x)         x = h + MLP(RMS2 h)           each block, norm_order "pre"
    h       = x + Attn(x)              x = RMS2(h + MLP(RMS1 h))     each block, norm_order "post"
    logits  = W RMS x

    MLP(x)  = W2 (silu(W1 x) ⊙ W3 x)

Attn: grouped-query attention with rotary embedding. No biases.
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
from fira.nn.embedding import Embedding, Head
from fira.nn.init import Normal
from fira.nn.mlp import GatedMLP, relu_squared
from fira.nn.norms import RMSNorm
from fira.nn.residual import Residual
from fira.nn.rotary import Rotary, Stretch
from fira.value_types import Layers, NotNegative, Positive, Size, Tokens


@dataclass(frozen=True)
class MooshakConfig(Options):
    """Hyperparameters of mooshak. seq_len: longest context. d_ff: width of the MLP's hidden layer.

    n_kv_head: number of key and value heads; None: n_head.
    tied: the head shares the embedding's weight, as in small Llama models.
    rope_factor, rope_low, rope_high, rope_original: frequency scaling of Llama 3.1, see Stretch; factor 1: none.
    qk_norm: RMS-normalise queries and keys per head.
    """

    vocab_size: Tokens = 64128
    seq_len: Tokens = 2048
    d_model: Size = 4096
    n_head: Size = 32
    n_kv_head: Size | None = None
    num_layers: Layers = 8
    d_ff: Size = 11008
    rope_theta: Positive = 1e4
    norm_eps: NotNegative = 1e-6
    norm_order: str = "pre"
    tied: bool = False
    rope_factor: Positive = 1.0
    rope_low: Positive = 1.0
    rope_high: Positive = 4.0
    rope_original: Tokens = 8192
    qk_norm: bool = False


class Block(Layer):
    """Attention and MLP, each with a residual connection. index: position in `LanguageModel.layers`."""

    compilable = ("forward",)

    def __init__(self, config: MooshakConfig, index: int) -> None:
        super().__init__()
        c = config
        if c.norm_order not in ("pre", "post"):
            raise ValueError(f"norm_order {c.norm_order!r} is neither 'pre' nor 'post'")
        self.norm_first = c.norm_order == "pre"
        stretch = Stretch(c.rope_factor, c.rope_low, c.rope_high, c.rope_original) if c.rope_factor != 1 else None
        rotary = Rotary(c.d_model // c.n_head, c.rope_theta, stretch=stretch)
        self.attention = SelfAttention(
            c.d_model,
            c.n_head,
            f"layers.{index}.attention",
            Normal,
            n_kv_head=c.n_kv_head,
            qk_norm_eps=c.norm_eps if c.qk_norm else None,
            qk_norm_per_head=True,
            rotary=rotary,
            value_vocab=c.vocab_size if c.value_embeddings else None,
        )
        self.mlp = GatedMLP(c.d_model, c.d_ff, Normal, relu_squared if c.relu_squared else F.silu)
        self.norm1, self.norm2 = (RMSNorm(c.d_model, c.norm_eps) for _ in range(2))
        self.residual1, self.residual2 = (Residual(c.residual_scalars) for _ in range(2))

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x [B, T, d] → [B, T, d]."""
        if self.norm_first:
            h = self.residual1(x, self.attention(self.norm1(x), context))
            return self.residual2(h, self.mlp(self.norm2(h)))
        h = self.residual1(x, self.attention(x, context))
        return self.norm2(self.residual2(h, self.mlp(self.norm1(h))))


class Mooshak(LanguageModel):
    """Build with a config, or with its fields: `Mooshak(vocab_size=…, d_model=…, …)`."""

    config: MooshakConfig

    def __init__(self, config: MooshakConfig | None = None, **arguments: int | float | str) -> None:
        c = config or MooshakConfig(**arguments)  # type: ignore[arg-type]
        blocks = [Block(c, index) for index in range(1, c.num_layers + 1)]
        head = Head(RMSNorm(c.d_model, c.norm_eps), Normal(c.d_model, c.vocab_size, bias=False), c.softcap)
        embedding = Embedding(c.vocab_size, c.d_model, std=0.02)
        super().__init__(c, nn.Sequential(embedding, *blocks, head), tied=c.tied)


FAMILY = Family(
    name="mooshak",
    model=Mooshak,
    config=MooshakConfig,
    presets={
        "mooshak-base": MooshakConfig(),
        "mooshak-tiny": MooshakConfig(vocab_size=2048, seq_len=128, d_model=128, n_head=4, num_layers=4, d_ff=352),
    },
    recipes={
        "mooshak-base": Recipe(steps=100_000, lr=3e-4, min_lr=3e-5, warmup=3000),
        "mooshak-tiny": TINY,
    },
)
