"""Models of transformers with our weights: FlexOlmo or OLMoE for rish, and Llama for mooshak."""

from typing import Any

import torch
import transformers
from torch import Tensor

from fira.models.mooshak import MooshakConfig
from fira.models.rish import RishConfig

SMALL: dict[str, Any] = {"vocab_size": 31, "seq_len": 24, "d_model": 24, "n_head": 6, "num_layers": 2, "d_ff": 20}


RISH = RishConfig(**SMALL, n_kv_head=2, num_experts=5, top_k=3, max_position=24, rope_factor=2.0)


OLMOE = RishConfig(**SMALL, n_kv_head=2, num_experts=5, top_k=3, max_position=24, rope_factor=2.0, norm_order="pre")


MOOSHAK = MooshakConfig(**SMALL, n_kv_head=3)


ATTENTION = {f"attention.{n}.weight": f"self_attn.{n}_proj.weight" for n in "qkvo"}


OLMO_NORMS = {
    "post": {"norm1.weight": "post_attention_layernorm.weight", "norm2.weight": "post_feedforward_layernorm.weight"},
    "pre": {"norm1.weight": "input_layernorm.weight", "norm2.weight": "post_attention_layernorm.weight"},
}
BLOCKS = {
    RishConfig: ATTENTION
    | {
        "attention.q_norm.weight": "self_attn.q_norm.weight",
        "attention.k_norm.weight": "self_attn.k_norm.weight",
        "moe.router.gate.weight": "mlp.gate.weight",
        "moe.experts.w1": "mlp.experts.gate_up_proj",
        "moe.experts.w2": "mlp.experts.down_proj",
    },
    MooshakConfig: ATTENTION
    | {
        "norm1.weight": "input_layernorm.weight",
        "norm2.weight": "post_attention_layernorm.weight",
        "mlp.w1.weight": "mlp.gate_proj.weight",
        "mlp.w3.weight": "mlp.up_proj.weight",
        "mlp.w2.weight": "mlp.down_proj.weight",
    },
}


def names(config: RishConfig | MooshakConfig) -> dict[str, str]:
    """Names of the parameters in transformers, by our names."""
    last = f"layers.{config.num_layers + 1}"
    pairs = {
        "layers.0.token.weight": "model.embed_tokens.weight",
        f"{last}.norm.weight": "model.norm.weight",
        f"{last}.project.weight": "lm_head.weight",
    }
    block = BLOCKS[type(config)] | (OLMO_NORMS[config.norm_order] if isinstance(config, RishConfig) else {})
    for layer in range(config.num_layers):
        ours, theirs = f"layers.{layer + 1}", f"model.layers.{layer}"
        pairs |= {f"{ours}.{a}": f"{theirs}.{b}" for a, b in block.items()}
    return pairs


def twin(config: Any, weights: dict[str, Tensor], dtype: torch.dtype, rope: str = "default") -> Any:
    """Build the model of transformers with our weights."""
    c = config
    shape = {
        "vocab_size": c.vocab_size,
        "hidden_size": c.d_model,
        "intermediate_size": c.d_ff,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.n_head,
        "num_key_value_heads": c.n_kv_head,
        "max_position_embeddings": getattr(c, "max_position", c.seq_len),
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": False,
        "pad_token_id": None,
        "rope_parameters": {"rope_type": rope, "rope_theta": c.rope_theta},
    }
    if rope == "dynamic":
        shape["rope_parameters"]["factor"] = c.rope_factor
    if isinstance(c, RishConfig):
        routing = {"num_experts": c.num_experts, "num_experts_per_tok": c.top_k, "norm_topk_prob": False}
        kind = transformers.OlmoeForCausalLM if c.norm_order == "pre" else transformers.FlexOlmoForCausalLM
        olmo_config = kind.config_class(**shape, **routing, output_router_logits=True)
        olmo_config._experts_implementation = "eager"  # the grouped implementation does not support float64
        model = kind(olmo_config)
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
    model.to(dtype).eval()
    result = model.load_state_dict({theirs: weights[ours] for ours, theirs in names(c).items()}, strict=False)
    assert not result.missing_keys
    assert not result.unexpected_keys
    return model
