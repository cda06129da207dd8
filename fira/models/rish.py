"""rish: a mixture of experts with normalised outputs of attention and experts, as in OLMo 2 and FlexOlmo.

    x       = Emb[token]
    x      += RMS1(Attn(x))         x += RMS2(MoE(x))                each block, norm_order "post"
    x      += Attn(RMS1 x)          x += MoE(RMS2 x)                 each block, norm_order "pre", as in OLMoE
    logits  = W RMS x

    MoE(x)  = Σ_e p_e · W2_e (silu(g) ⊙ a),  (g, a) = W1_e x         over the k experts with the largest p_e
    p       = softmax(W_r x)

Attn: grouped-query attention with rotary embedding; q and k are RMS-normalised over their full width. No biases.
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
from fira.nn.mlp import relu_squared
from fira.nn.moe.aux_losses import load_balance
from fira.nn.moe.experts import GatedExperts
from fira.nn.moe.layer import MoE
from fira.nn.moe.router import Router
from fira.nn.norms import RMSNorm
from fira.nn.residual import Residual
from fira.nn.rotary import Rotary
from fira.value_types import Layers, NotNegative, Positive, Share, Size, Tokens


@dataclass(frozen=True)
class RishConfig(Options):
    """Hyperparameters of rish. seq_len: longest context. d_ff: width of an expert's hidden layer.

    n_kv_head: number of key and value heads. top_k: number k of experts per token, or a fraction of all experts.
    norm_order: "post" normalises the outputs of attention and experts, "pre" their inputs.
    max_position, rope_factor: in longer sequences the rotary base grows with the length, see Rotary. Decoding with a
    cache is then an approximation: cached values were computed with the base of a shorter text.
    """

    vocab_size: Tokens = 100352
    seq_len: Tokens = 4096
    d_model: Size = 4096
    n_head: Size = 32
    n_kv_head: Size = 8
    num_layers: Layers = 32
    d_ff: Size = 11008
    num_experts: Size = 7
    top_k: Size | Share = 5
    max_position: Tokens = 4096
    rope_theta: Positive = 5e5
    rope_factor: Positive = 1.0
    norm_eps: NotNegative = 1e-6
    aux_coefficient: NotNegative = 0.01
    norm_order: str = "post"


class Block(Layer):
    """Attention and mixture of experts, each with a residual connection. index: position in `LanguageModel.layers`."""

    compilable = ("attend", "add_experts")

    def __init__(self, config: RishConfig, index: int) -> None:
        super().__init__()
        c = config
        if c.norm_order not in ("pre", "post"):
            raise ValueError(f"norm_order {c.norm_order!r} is neither 'pre' nor 'post'")
        self.norm_first = c.norm_order == "pre"
        self.attention = SelfAttention(
            c.d_model,
            c.n_head,
            f"layers.{index}.attention",
            Normal,
            n_kv_head=c.n_kv_head,
            qk_norm_eps=c.norm_eps,
            rotary=Rotary(
                c.d_model // c.n_head,
                c.rope_theta,
                c.max_position if c.max_position < c.seq_len else None,
                c.rope_factor,
            ),
            value_vocab=c.vocab_size if c.value_embeddings else None,
        )
        router = Router(c.d_model, c.num_experts, c.top_k, bias=False, renormalise=False)
        activation = relu_squared if c.relu_squared else F.silu
        experts = GatedExperts(c.num_experts, c.d_model, c.d_ff, activation, std=0.02)
        # as in transformers, whose loss is a mean over layers
        balance = (load_balance, c.aux_coefficient / c.num_layers)
        self.moe = MoE(router, experts, c.num_experts, index, [balance])
        self.norm1, self.norm2 = (RMSNorm(c.d_model, c.norm_eps) for _ in range(2))
        self.residual1, self.residual2 = (Residual(c.residual_scalars) for _ in range(2))

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x [B, T, d] → [B, T, d]."""
        x = self.attend(x, context)
        return self.add_experts(x, self.moe(self.norm2(x) if self.norm_first else x, context, None))

    def attend(self, x: Tensor, context: Context) -> Tensor:
        """x [B, T, d] → x + RMS1(Attn(x)), or x + Attn(RMS1 x)."""
        if self.norm_first:
            return self.residual1(x, self.attention(self.norm1(x), context))
        return self.residual1(x, self.norm1(self.attention(x, context)))

    def add_experts(self, x: Tensor, y: Tensor) -> Tensor:
        """x, y [B, T, d] → x + RMS2(y), or x + y."""
        return self.residual2(x, y if self.norm_first else self.norm2(y))


class Rish(LanguageModel):
    """Build with a config, or with its fields: `Rish(vocab_size=…, d_model=…, …)`."""

    config: RishConfig

    def __init__(self, config: RishConfig | None = None, **arguments: int | float | str) -> None:
        c = config or RishConfig(**arguments)  # type: ignore[arg-type]
        blocks = [Block(c, index) for index in range(1, c.num_layers + 1)]
        head = Head(RMSNorm(c.d_model, c.norm_eps), Normal(c.d_model, c.vocab_size, bias=False), c.softcap)
        super().__init__(c, nn.Sequential(Embedding(c.vocab_size, c.d_model, std=0.02), *blocks, head))


FAMILY = Family(
    name="rish",
    model=Rish,
    config=RishConfig,
    presets={
        "rish-base": RishConfig(),
        "rish-tiny": RishConfig(
            vocab_size=2048,
            seq_len=128,
            d_model=128,
            n_head=4,
            n_kv_head=2,
            num_layers=4,
            d_ff=128,
            num_experts=4,
            top_k=2,
            max_position=128,
        ),
        "rish-olmoe-base": RishConfig(
            vocab_size=50304,
            d_model=2048,
            n_head=16,
            n_kv_head=16,
            num_layers=16,
            d_ff=1024,
            num_experts=64,
            top_k=8,
            rope_theta=1e4,
            norm_eps=1e-5,
            norm_order="pre",
        ),
        "rish-olmoe-tiny": RishConfig(
            vocab_size=2048,
            seq_len=128,
            d_model=128,
            n_head=4,
            n_kv_head=4,
            num_layers=4,
            d_ff=64,
            num_experts=8,
            top_k=2,
            max_position=128,
            rope_theta=1e4,
            norm_order="pre",
        ),
    },
    recipes={
        "rish-base": Recipe(steps=100_000, lr=3e-4, min_lr=3e-5, warmup=2000),
        "rish-tiny": TINY,
        "rish-olmoe-base": Recipe(steps=100_000, lr=4e-4, min_lr=4e-5, warmup=2000),
        "rish-olmoe-tiny": TINY,
    },
)
