"""The tensors of a GGUF file, and the weights of a model from which each is read.

    Fira                          GGUF                                                shape, rows first
    layers.0.token.weight         token_embd.weight                                   [V, d]
    layers.3.attention.q.weight   blk.2.attn_q.weight                                 [d, d]
    layers.3.mlp.w1.weight        blk.2.ffn_gate.weight                               [d_ff, d]
    layers.3.moe.experts.w1       blk.2.ffn_gate_exps.weight, ffn_up_exps.weight      2 × [E, d_ff, d]
    layers.9.project.weight       output.weight; none if the embedding is tied        [V, d]

llama.cpp rotates the channels (2i, 2i + 1) of a head in the architecture `llama`, where Fira and transformers rotate
(i, i + hd/2). The rows of q and k are permuted accordingly. In `olmoe` it rotates (i, i + hd/2), too.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fira.checkpoint.merged_checkpoint import SavedModel
from fira.checkpoint.pretrained import read_weight
from fira.checkpoint.transformers_mapping import WITHOUT_EQUIVALENT
from fira.errors import UserError
from fira.models.language_model import LanguageModel
from fira.models.mooshak import MooshakConfig
from fira.models.registry import family_of
from fira.models.rish import RishConfig
from fira.nn.rotary import Stretch

ATTENTION = {
    "norm1.weight": "attn_norm",
    "attention.v.weight": "attn_v",
    "attention.o.weight": "attn_output",
    "norm2.weight": "ffn_norm",
}
NAMES = {  # of tensors that are stored as they are, by the name of the weight in a block
    "llama": ATTENTION | {"mlp.w1.weight": "ffn_gate", "mlp.w3.weight": "ffn_up", "mlp.w2.weight": "ffn_down"},
    "olmoe": ATTENTION
    | {
        "attention.q.weight": "attn_q",
        "attention.k.weight": "attn_k",
        "attention.q_norm.weight": "attn_q_norm",
        "attention.k_norm.weight": "attn_k_norm",
        "moe.router.gate.weight": "ffn_gate_inp",
        "moe.experts.w2": "ffn_down_exps",
    },
}
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
ROUTER = "ffn_gate_inp.weight"  # after the name of the block


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a GGUF file. read: returns it in fp32 from an opened checkpoint or folder of transformers."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[SavedModel], Tensor]


def architecture_of(config: Any) -> str:
    """Return llama.cpp's architecture that computes the model of a config: `llama` or `olmoe`.

    Raises UserError, with the format to use instead, if there is none.
    """
    if not isinstance(config, MooshakConfig | RishConfig):
        raise UserError(
            f"--format gguf: llama.cpp has no architecture of a {family_of(config).name}; export with --format fira"
        )
    refused = {option: "fira" for option in (*WITHOUT_EQUIVALENT, "relu_squared") if getattr(config, option, False)}
    if isinstance(config, RishConfig):
        if config.norm_order != "pre":
            refused["norm_order"] = "flexolmo"
        elif config.max_position < config.seq_len:
            refused["max_position"] = "olmoe"
        elif config.n_kv_head != config.n_head:
            refused["n_kv_head"] = "olmoe"
    elif config.norm_order != "pre":
        refused["norm_order"] = "fira"
    for option, form in refused.items():
        value = getattr(config, option)
        raise UserError(f"--format gguf: {option}={value} has no equivalent in llama.cpp; export with --format {form}")
    return "olmoe" if isinstance(config, RishConfig) else "llama"


def gguf_tensors(model: LanguageModel) -> Iterator[GgufTensor]:
    """Yield the tensors of a model's file, layer by layer. The model may be on the meta device."""
    config, architecture = model.config, architecture_of(model.config)
    weights = {name: tuple(value.shape) for name, value in model.weights().items()}
    last = f"layers.{config.num_layers + 1}"
    yield _stored(EMBEDDING, "layers.0.token.weight", weights)
    if getattr(config, "rope_factor", 1) != 1 and architecture == "llama":
        yield _rope_divisors(config)
    for layer in range(config.num_layers):
        ours, theirs = f"layers.{layer + 1}", f"blk.{layer}"
        for name, stored in NAMES[architecture].items():
            yield _stored(f"{theirs}.{stored}.weight", f"{ours}.{name}", weights)
        if architecture == "llama":
            yield _with_paired_channels(f"{theirs}.attn_q.weight", f"{ours}.attention.q.weight", weights, config.n_head)
            heads = config.n_kv_head or config.n_head
            yield _with_paired_channels(f"{theirs}.attn_k.weight", f"{ours}.attention.k.weight", weights, heads)
        else:
            for half, stored in enumerate(("ffn_gate_exps", "ffn_up_exps")):
                yield _half_of_experts(f"{theirs}.{stored}.weight", f"{ours}.moe.experts.w1", weights, half)
    yield _stored("output_norm.weight", f"{last}.norm.weight", weights)
    if not model.tied:
        yield _stored(HEAD, f"{last}.project.weight", weights)


def _stored(name: str, weight: str, weights: dict[str, tuple[int, ...]]) -> GgufTensor:
    """A tensor that is a weight."""
    shape = weights[weight]
    return GgufTensor(name, shape, lambda saved: read_weight(saved, weight, shape).float())


def _with_paired_channels(name: str, weight: str, weights: dict[str, tuple[int, ...]], heads: int) -> GgufTensor:
    """A weight [H · hd, d] with the rows i and i + hd/2 of each head next to each other."""
    shape = weights[weight]

    def read(saved: SavedModel) -> Tensor:
        rows = read_weight(saved, weight, shape).float()
        return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(shape)

    return GgufTensor(name, shape, read)


def _half_of_experts(name: str, weight: str, weights: dict[str, tuple[int, ...]], half: int) -> GgufTensor:
    """The first or the second half of the rows of each expert's matrix, of a weight [E, 2 · d_ff, d]."""
    stored = weights[weight]
    experts, rows, width = stored[0], stored[1] // 2, stored[2]

    def read(saved: SavedModel) -> Tensor:
        halves = torch.empty(experts, rows, width)
        for expert, matrix in enumerate(halves):
            both = read_weight(saved, weight, stored, expert, expert + 1)[0]
            matrix.copy_(both[half * rows : (half + 1) * rows])
        return halves

    return GgufTensor(name, (experts, rows, width), read)


def _rope_divisors(config: MooshakConfig) -> GgufTensor:
    """The divisors [hd/2] of the rotary frequencies that have the effect of Llama 3.1's scaling."""
    head_dim = config.d_model // config.n_head
    stretch = Stretch(config.rope_factor, config.rope_low, config.rope_high, config.rope_original)
    frequencies = config.rope_theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    divisors = (frequencies / stretch(frequencies)).float()
    return GgufTensor("rope_freqs.weight", (head_dim // 2,), lambda saved: divisors)
