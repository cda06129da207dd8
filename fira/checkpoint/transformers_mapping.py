"""Mapping between families and equivalent classes of transformers: mooshak ↔ Llama, rish ↔ FlexOlmo and OLMoE.

Configs are converted in both directions, with a UserError that names an option without an equivalent on the other side.
Weights are identical tensors with different names. In mappings of names, Fira's name is the key or comes first, except
in SHARED and ROPE_SCALING, whose keys are the keys of config.json.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fira.errors import UserError
from fira.json_reader import anything, integer, mapping, nullable, record, text
from fira.models.mooshak import MooshakConfig
from fira.models.registry import family_of
from fira.models.rish import RishConfig
from fira.nn.moe.router import number_chosen

ATTENTION = {f"attention.{name}.weight": f"self_attn.{name}_proj.weight" for name in "qkvo"}
ROPE_SCALING = {  # Llama 3's
    "factor": "rope_factor",
    "low_freq_factor": "rope_low",
    "high_freq_factor": "rope_high",
    "original_max_position_embeddings": "rope_original",
}

WITHOUT_EQUIVALENT = ("softcap", "qk_norm", "value_embeddings", "residual_scalars")  # options that must be off
ACTIVATIONS = {False: "silu", True: "relu2"}  # by relu_squared

SIZE = integer(1, 2**31)
# Of the values that `from_transformers` computes with; the fields of a config are checked by `from_document`.
TRANSFORMERS_SCHEMA = record(
    {},
    {"model_type": text(), "hidden_act": text(), "head_dim": nullable(SIZE)}
    | dict.fromkeys(("hidden_size", "num_attention_heads", "num_hidden_layers", "max_position_embeddings"), SIZE)
    | dict.fromkeys(("rope_parameters", "rope_scaling"), nullable(mapping(anything))),
)


@dataclass(frozen=True)
class TransformersClass:
    """A class of transformers and the equivalent family."""

    architecture: str  # the name of the class
    config: type[MooshakConfig] | type[RishConfig]  # of the family
    norm_order: str  # of the config
    block: dict[str, str]  # names of the tensors of a block
    to_document: Callable[[Any], dict[str, Any]]  # config → keys of config.json that are not in SHARED
    to_fields: Callable[[dict[str, Any]], dict[str, Any]]  # config.json → fields of the config that are not in SHARED


def _llama_fields(config: MooshakConfig) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_factor != 1:
        rope |= {"rope_type": "llama3"} | {key: getattr(config, field) for key, field in ROPE_SCALING.items()}
    return {"max_position_embeddings": config.seq_len, "tie_word_embeddings": config.tied, "rope_parameters": rope}


def _mooshak_fields(document: dict[str, Any]) -> dict[str, Any]:
    rope = _rope(document, 1e4)
    _require(document, attention_bias=False, mlp_bias=False)
    _require(rope, partial_rotary_factor=1.0)
    fields = {"rope_theta": rope["rope_theta"], "tied": document.get("tie_word_embeddings", False)}
    if rope["rope_type"] == "llama3":
        return fields | {field: rope[key] for key, field in ROPE_SCALING.items()}
    _require(rope, rope_type="default")
    return fields


def _flexolmo_fields(config: RishConfig) -> dict[str, Any]:
    return {
        "max_position_embeddings": config.max_position,
        "seq_len": config.seq_len,  # not a key of FlexOlmo, whose dynamic scaling does not limit the length
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": config.rope_theta, "factor": config.rope_factor},
        "num_experts": config.num_experts,
        "num_experts_per_tok": number_chosen(config.top_k, config.num_experts),
        "norm_topk_prob": False,
        "router_aux_loss_coef": config.aux_coefficient,
    }


def _olmoe_fields(config: RishConfig) -> dict[str, Any]:
    return _flexolmo_fields(config) | {"clip_qkv": None}


def _rish_fields(document: dict[str, Any]) -> dict[str, Any]:
    rope = _rope(document, 5e5)
    _require(document, attention_bias=False, norm_topk_prob=False, tie_word_embeddings=False)
    longest = document["max_position_embeddings"]
    if rope["rope_type"] == "dynamic":
        factor = rope["factor"]
        if type(factor) not in (int, float) or not 1 <= factor <= 2**20:
            raise UserError(f"config.json: rope factor {factor!r:.40} is not a number from 1 to {2**20}")
        longest = document.get("seq_len", int(factor * longest))
    else:
        _require(rope, rope_type="default")
    return {
        "seq_len": longest,
        "rope_theta": rope["rope_theta"],
        # Without scaling the factor is unused, because no sequence is longer than max_position.
        "rope_factor": rope.get("factor", 1.0),
        "max_position": document["max_position_embeddings"],
        "num_experts": document["num_experts"],
        "top_k": document["num_experts_per_tok"],
        "aux_coefficient": document.get("router_aux_loss_coef", 0.01),
    }


def _rish_fields_of_olmoe(document: dict[str, Any]) -> dict[str, Any]:
    _require(document, clip_qkv=None)
    return _rish_fields({"rope_theta": 1e4} | document) | {"norm_order": "pre"}


OLMO_TENSORS = ATTENTION | {
    "attention.q_norm.weight": "self_attn.q_norm.weight",
    "attention.k_norm.weight": "self_attn.k_norm.weight",
    "moe.router.gate.weight": "mlp.gate.weight",
    "moe.experts.w1": "mlp.experts.gate_up_proj",
    "moe.experts.w2": "mlp.experts.down_proj",
}
NORMS_FIRST = {"norm1.weight": "input_layernorm.weight", "norm2.weight": "post_attention_layernorm.weight"}
NORMS_LAST = {"norm1.weight": "post_attention_layernorm.weight", "norm2.weight": "post_feedforward_layernorm.weight"}
TRANSFORMERS = {
    "llama": TransformersClass(
        "LlamaForCausalLM",
        MooshakConfig,
        "pre",
        ATTENTION
        | NORMS_FIRST
        | {
            "mlp.w1.weight": "mlp.gate_proj.weight",
            "mlp.w3.weight": "mlp.up_proj.weight",
            "mlp.w2.weight": "mlp.down_proj.weight",
        },
        _llama_fields,
        _mooshak_fields,
    ),
    "flexolmo": TransformersClass(
        "FlexOlmoForCausalLM", RishConfig, "post", OLMO_TENSORS | NORMS_LAST, _flexolmo_fields, _rish_fields
    ),
    "olmoe": TransformersClass(
        "OlmoeForCausalLM", RishConfig, "pre", OLMO_TENSORS | NORMS_FIRST, _olmoe_fields, _rish_fields_of_olmoe
    ),
}
SHARED = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "intermediate_size": "d_ff",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "n_head",
    "rms_norm_eps": "norm_eps",
}


def to_transformers(config: Any, form: str) -> dict[str, Any]:
    """Return the arguments of transformers' config class `form`. Raises UserError if it has no equivalent."""
    target = TRANSFORMERS[form]
    if not isinstance(config, target.config):
        raise UserError(f"--format {form}: a {family_of(config).name} has no equivalent; export with --format fira")
    for option in WITHOUT_EQUIVALENT:
        if value := getattr(config, option, False):
            name = target.architecture.removesuffix("ForCausalLM")
            raise UserError(f"{option}={value} has no equivalent in {name}; export with --format fira")
    if config.norm_order != target.norm_order:
        name, other = target.architecture.removesuffix("ForCausalLM"), _form_with_norms(config)
        raise UserError(f"norm_order={config.norm_order} has no equivalent in {name}; export with --format {other}")
    values = {key: getattr(config, field) for key, field in SHARED.items()}
    values |= {
        "num_key_value_heads": config.n_kv_head or config.n_head,
        "hidden_act": ACTIVATIONS[config.relu_squared],
    }
    return values | target.to_document(config)


def _form_with_norms(config: Any) -> str:
    """The format that has the config's family and order of norms."""
    found = (form for form, target in TRANSFORMERS.items() if type(config) is target.config)
    return next((form for form in found if TRANSFORMERS[form].norm_order == config.norm_order), "fira")


def from_transformers(document: dict[str, Any]) -> tuple[Any, dict[str, str]]:
    """Return the config for a config.json of transformers, and the names of the weights (see `weight_names`).

    Raises UserError if it has no equivalent or lacks a key.
    """
    form = str(document.get("model_type")).replace("_", "")
    if form not in TRANSFORMERS:
        raise UserError(f"model_type {document.get('model_type')}; give an export of Fira, a llama, flex_olmo or olmoe")
    source = TRANSFORMERS[form]
    activation = document.get("hidden_act", "silu")
    if activation not in ACTIVATIONS.values():
        raise UserError(f"config.json: hidden_act {activation} has no equivalent; silu or relu2 is required")
    try:
        values = {field: document[key] for key, field in SHARED.items()}
        context = document.get("seq_len", document["max_position_embeddings"])
        values |= {"n_kv_head": document.get("num_key_value_heads"), "seq_len": context}
        values["relu_squared"] = activation == ACTIVATIONS[True]
        values |= source.to_fields(document)
    except KeyError as error:
        raise UserError(f"config.json has no {error.args[0]}; a {form} needs it") from None
    values["n_kv_head"] = values["n_kv_head"] or values["n_head"]
    if (document.get("head_dim") or values["d_model"] // values["n_head"]) * values["n_head"] != values["d_model"]:
        raise UserError(
            f"head_dim {document['head_dim']} has no equivalent; hidden_size {values['d_model']} / heads is required"
        )
    config = source.config(**values)
    return config, weight_names(config, form)


def weight_names(config: Any, form: str) -> dict[str, str]:
    """Return the names of all weights in Fira and in the module of transformers, where experts are one tensor."""
    last = f"layers.{config.num_layers + 1}"
    pairs = {"layers.0.token.weight": "model.embed_tokens.weight", f"{last}.norm.weight": "model.norm.weight"}
    if not getattr(config, "tied", False):
        pairs[f"{last}.project.weight"] = "lm_head.weight"
    for layer in range(config.num_layers):
        block = TRANSFORMERS[form].block.items()
        pairs |= {f"layers.{layer + 1}.{name}": f"model.layers.{layer}.{stored}" for name, stored in block}
    return pairs


def expert_tensors(name: str, expert: int) -> list[str]:
    """Return the names in files of the tensors that are concatenated to one expert's weights in the module's `name`."""
    path, _, kind = name.rpartition(".")
    parts = ["gate_proj", "up_proj"] if kind == "gate_up_proj" else [kind]
    return [f"{path}.{expert}.{part}.weight" for part in parts]


def _rope(document: dict[str, Any], theta: float) -> dict[str, Any]:
    """Return the options of the rotary embedding, from a config.json of any version of transformers."""
    rope = document.get("rope_parameters") or document.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    return {"rope_theta": document.get("rope_theta", theta)} | rope | {"rope_type": kind}


def _require(document: dict[str, Any], **values: Any) -> None:
    for name, value in values.items():
        if (found := document.get(name, value)) != value:
            raise UserError(f"config.json: {name} {found} has no equivalent; {value} is required")
