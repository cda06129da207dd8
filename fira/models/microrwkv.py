"""microrwkv: RWKV-5 time mixing, sliding-window attention, gated attention and a small mixture of experts.

    x       = Emb[token] + Pos[position]
    x      += TimeMix(rms x)                                         each block
    x      += ChannelMix(rms x)
    x      += Sliding(x)
    x      += Grouped(TimeMix(x))                                    the same TimeMix as above
    x      += MoE(x)
    logits  = Emb LN x

    MoE(x)  = W Σ_e p_e (W_e x + b_e) + b                            over the k experts with the largest p_e
    p       = softmax(W_r x + b_r)

rms: RMS norm without gain. Sliding: attention to the last `window` tokens. Grouped: attention with n_group · n_head
heads, whose output is multiplied by a linear function of its input. LN has no bias.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from fira.errors import UserError
from fira.models.family import TINY, Family, Recipe
from fira.models.language_model import LanguageModel
from fira.nn.attention import SelfAttention
from fira.nn.base_layer import Layer
from fira.nn.context import Context
from fira.nn.embedding import Embedding, Head
from fira.nn.init import Normal
from fira.nn.moe.aux_losses import load_balance, small_outputs
from fira.nn.moe.experts import LinearExperts
from fira.nn.moe.layer import MoE
from fira.nn.moe.router import Router
from fira.nn.norms import UnitRMS
from fira.nn.rwkv import ChannelMix, TimeMix
from fira.value_types import Layers, NotNegative, Share, Size, Tokens, check


@dataclass(frozen=True)
class MicroRWKVConfig:
    """Hyperparameters of microrwkv. seq_len: longest context. d_moe: width of an expert's output.

    n_group: number of groups of n_head heads in Grouped. window: number of tokens that Sliding attends to.
    top_k: number k of experts per token, or a fraction of all experts.
    output_coefficient, aux_coefficient: of the losses `small_outputs` and `load_balance`.
    softcap: limit c of the logits, c · tanh(logits / c); 0: none.
    """

    vocab_size: Tokens = 50304
    seq_len: Tokens = 1024
    d_model: Size = 768
    n_head: Size = 8
    n_group: Size = 4
    num_layers: Layers = 8
    window: Tokens = 256
    d_moe: Size = 614
    num_experts: Size = 4
    top_k: Size | Share = 4
    output_coefficient: NotNegative = 0.01
    aux_coefficient: NotNegative = 0.0
    softcap: NotNegative = 0.0


NAMES = {  # of fields in the original code
    "block_size": "seq_len",
    "n_layer": "num_layers",
    "n_embd": "d_model",
    "dim": "d_model",
    "num_active_experts": "top_k",
}
FIXED = {"dropout": 0.0, "bias": False}  # fields of the original code that have no other value


def from_original(given: Mapping[str, Any]) -> dict[str, Any]:
    """Convert fields with the names of the original code. Its experts are 1.2 times as wide as its `expert_dim`.

    Raises UserError for another value than that in FIXED, and if two names of a field have different values.
    """
    values: dict[str, Any] = {}
    names: dict[str, str] = {}
    for name, value in given.items():
        field = NAMES.get(name, name)
        if values.setdefault(field, value) != value:
            raise UserError(f"microrwkv: {names[field]} and {name} are both {field}, and differ; give one of them")
        names[field] = name
    for name, value in FIXED.items():
        if values.pop(name, value) != value:
            raise UserError(f"microrwkv: {name} is always {str(value).lower()}; omit it")
    if "expert_dim" in values:
        check("expert_dim", values["expert_dim"], Size)
        width = int(1.2 * values.pop("expert_dim"))
        if values.setdefault("d_moe", width) != width:
            raise UserError(f"microrwkv: expert_dim makes d_moe {width}, which differs from d_moe; give one of them")
    return values


class TinyMoE(nn.Module):
    """MoE of the block. The projection W is shared by the experts."""

    lora_target = "experts"  # for the projection; the experts are a module of their own

    def __init__(self, config: MicroRWKVConfig, index: int) -> None:
        super().__init__()
        c = config
        router = Router(c.d_model, c.num_experts, c.top_k, renormalise=False)
        losses = [(small_outputs, c.output_coefficient), (load_balance, c.aux_coefficient)]
        self.moe = MoE(router, LinearExperts(c.num_experts, c.d_model, c.d_moe), c.num_experts, index, losses)
        self.project = Normal(c.d_moe, c.d_model)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x [B, T, d] → [B, T, d]."""
        return self.project(self.moe(x, context, None))


class Block(Layer):
    """Five layers with residual connections. index: position in `LanguageModel.layers`, 1 for the first block."""

    compilable = ("mix",)

    def __init__(self, config: MicroRWKVConfig, index: int) -> None:
        super().__init__()
        c = config
        name, place = f"layers.{index}", (index - 1, c.num_layers)
        self.rms = UnitRMS()
        self.time_mix = TimeMix(c.d_model, c.n_head, *place, f"{name}.time_mix")
        self.channel_mix = ChannelMix(c.d_model, 3 * c.d_model, *place, f"{name}.channel_mix")
        self.sliding = SelfAttention(c.d_model, c.n_head, f"{name}.sliding", Normal, window=c.window)
        self.grouped = SelfAttention(c.d_model, c.n_group * c.n_head, f"{name}.grouped", Normal, gated=True)
        self.experts = TinyMoE(c, index)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x [B, T, d] → [B, T, d]."""
        x = self.mix(x, context)
        return x + self.experts(x, context)

    def mix(self, x: Tensor, context: Context) -> Tensor:
        """x [B, T, d] → x after all layers but the MoE."""
        x = context.zero_left_padding(x)
        x = x + self.time_mix(self.rms(x), context, "first")
        x = x + self.channel_mix(self.rms(x), context)
        x = x + self.sliding(x, context)
        return x + self.grouped(self.time_mix(x, context, "second"), context)

    def flops_per_token(self, length: int) -> float:
        """Forward FLOPs per token; time_mix counts twice."""
        second = sum(2.0 * p.numel() for p in self.time_mix.parameters() if p.dim() == 2)
        return super().flops_per_token(length) + second + self.time_mix.own_flops_per_token(length)


class MicroRWKV(LanguageModel):
    """Build with a config, or with its fields or those of the original code: `MicroRWKV(vocab_size=…, n_embd=…, …)`."""

    config: MicroRWKVConfig

    def __init__(self, config: MicroRWKVConfig | None = None, **arguments: int | float) -> None:
        c = config or MicroRWKVConfig(**from_original(arguments))
        blocks = [Block(c, index) for index in range(1, c.num_layers + 1)]
        project = nn.Linear(c.d_model, c.vocab_size, bias=False)
        head = Head(nn.LayerNorm(c.d_model, bias=False), project, c.softcap)
        embedding = Embedding(c.vocab_size, c.d_model, positions=c.seq_len, std=0.02)
        super().__init__(c, nn.Sequential(embedding, *blocks, head), tied=True)


FAMILY = Family(
    name="microrwkv",
    model=MicroRWKV,
    config=MicroRWKVConfig,
    presets={
        "microrwkv-base": MicroRWKVConfig(),
        "microrwkv-tiny": MicroRWKVConfig(
            vocab_size=2048, seq_len=128, d_model=96, n_head=4, n_group=2, num_layers=3, window=32, d_moe=64, top_k=2
        ),
    },
    recipes={
        "microrwkv-base": Recipe(steps=20_000, lr=6e-4, min_lr=6e-5, warmup=500),
        "microrwkv-tiny": replace(TINY, lr=1e-2, min_lr=2e-4),  # diverges with 4e-2
    },
    tied=True,
    recurrent=True,
    from_original=from_original,
)
