"""Configuration classes for transformers. Exported folders contain this file and all project files that it imports."""

import math
from dataclasses import field
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from fira.huggingface.model_code import write_model_code
from fira.models.registry import FAMILIES, from_document, to_document


def _named(name: str) -> property:
    """Property that reads and writes the field `name` of the family's config, for use under transformers' name."""

    def read(config: "FiraLMConfig") -> Any:
        if name not in config.shape:
            raise AttributeError(f"a {config.shape['family']} has no {name}")
        return config.shape[name]

    def write(config: "FiraLMConfig", value: Any) -> None:
        read(config)
        config.shape[name] = value

    return property(read, write)


class FiraLMConfig(PreTrainedConfig):
    """Configuration of any model family.

    shape: the family's name under `family`, and the fields of the family's config; omitted fields have their defaults.
    The fields are nested because transformers treats some of their names, such as `top_k`, as settings of generation.
    Most are also available under transformers' names, as attributes and as arguments:
    `FiraLMConfig(shape={…}, vocab_size=9)`.
    """

    model_type = "fira"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]
    family: ClassVar[str] = "fira"  # used if `shape` does not name one
    classes: ClassVar[dict[str, str]] = {"AutoModel": "FiraLMModel", "AutoModelForCausalLM": "FiraLMForCausalLM"}

    vocab_size = _named("vocab_size")
    hidden_size = _named("d_model")
    intermediate_size = _named("d_ff")
    num_hidden_layers = _named("num_layers")
    num_attention_heads = _named("n_head")
    num_key_value_heads = _named("n_kv_head")
    num_experts = _named("num_experts")
    num_experts_per_tok = _named("top_k")
    max_position_embeddings = _named("seq_len")
    rope_theta = _named("rope_theta")
    rms_norm_eps = _named("norm_eps")
    router_aux_loss_coef = _named("aux_coefficient")

    shape: dict[str, Any] = field(default_factory=dict)
    use_cache: bool = True
    output_router_logits: bool = False
    tie_word_embeddings: bool = False  # overwritten by the value of the family

    def __post_init__(self, **kwargs: Any) -> None:
        self.shape = {"family": self.family} | self.shape
        self.shape = to_document(self.own())
        self.tie_word_embeddings = FAMILIES[self.shape["family"]].is_tied(self.own())
        kwargs["auto_map"] = {"AutoConfig": f"configuration_fira.{type(self).__name__}"} | {
            auto: f"modeling_fira.{name}" for auto, name in self.classes.items()
        }
        super().__post_init__(**kwargs)

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Save config.json and the source code of the models, which `trust_remote_code` loads."""
        write_model_code(save_directory, __package__)
        super().save_pretrained(save_directory, *args, **kwargs)

    def own(self) -> Any:
        """The family's config, for example a FiraConfig."""
        return from_document(self.shape)


class RishAIConfig(FiraLMConfig):
    """Configuration of a rish model: `RishAIConfig(vocab_size=…, hidden_size=…, num_experts=…, …)`; see RishConfig."""

    model_type = "rish_ai"
    family: ClassVar[str] = "rish"
    classes: ClassVar[dict[str, str]] = {"AutoModel": "RishAIModel", "AutoModelForCausalLM": "RishAICausalLM"}

    def __post_init__(self, **kwargs: Any) -> None:
        scaling = [kwargs.pop(name, None) for name in ("rope_parameters", "rope_scaling")]
        super().__post_init__(**kwargs)
        for parameters in filter(None, scaling):  # after max_position_embeddings and rope_theta have been set
            self.rope_scaling = parameters

    @property
    def max_position_embeddings(self) -> int:
        """Longest context without `rope_scaling`, or the length above which the rotary base grows."""
        return min(self.shape["seq_len"], self.shape["max_position"])

    @max_position_embeddings.setter
    def max_position_embeddings(self, value: int) -> None:
        self.shape["seq_len"] = self.shape["max_position"] = value

    @property
    def rope_scaling(self) -> dict[str, Any]:
        """Parameters of the rotary embedding in the form of transformers, with `rope_type` "default" or "dynamic".

        "dynamic" increases the rotary base for sequences longer than `max_position_embeddings`, and the longest context
        to `factor` times as many tokens. Raises ValueError for another type.
        """
        if self.shape["seq_len"] <= self.shape["max_position"]:
            return {"rope_type": "default", "rope_theta": self.shape["rope_theta"]}
        return {"rope_type": "dynamic", "rope_theta": self.shape["rope_theta"], "factor": self.shape["rope_factor"]}

    @rope_scaling.setter
    def rope_scaling(self, parameters: dict[str, Any]) -> None:
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        if kind not in ("default", "dynamic"):
            raise ValueError(f"rope_type {kind!r}: give 'default' or 'dynamic'")
        self.shape["rope_theta"] = parameters.get("rope_theta", self.shape["rope_theta"])
        if kind == "dynamic":
            factor = parameters.get("factor")
            if not isinstance(factor, int | float) or not 1 <= factor < math.inf:
                raise ValueError(f"rope factor {factor!r}: give a number of at least 1")
            self.shape["rope_factor"] = float(factor)
            self.shape["seq_len"] = int(self.shape["max_position"] * self.shape["rope_factor"])
