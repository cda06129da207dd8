"""rish and mooshak compared with FlexOlmo and Llama of transformers."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fira.models.mooshak import MooshakConfig
from fira.models.rish import RishConfig
from fira.nn.context import Context, TrainingContext
from tests.fira.models.test_family_models import make_model, make_tokens

transformers = pytest.importorskip("transformers")
from transformers import modeling_rope_utils  # noqa: E402
from transformers.models.flex_olmo import modeling_flex_olmo  # noqa: E402
from transformers.models.llama import modeling_llama  # noqa: E402

SMALL: dict[str, Any] = {"vocab_size": 31, "seq_len": 24, "d_model": 24, "n_head": 6, "num_layers": 2, "d_ff": 20}
RISH = RishConfig(**SMALL, n_kv_head=2, num_experts=5, top_k=3, max_position=24, rope_factor=2.0)
MOOSHAK = MooshakConfig(**SMALL, n_kv_head=3)
ATTENTION = {f"attention.{n}.weight": f"self_attn.{n}_proj.weight" for n in "qkvo"}
BLOCKS = {
    RishConfig: ATTENTION
    | {
        "attention.q_norm.weight": "self_attn.q_norm.weight",
        "attention.k_norm.weight": "self_attn.k_norm.weight",
        "norm1.weight": "post_attention_layernorm.weight",
        "norm2.weight": "post_feedforward_layernorm.weight",
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


class _DoubleTorch:
    """The module torch with float64 as `float32`, the type in which transformers computes norms, angles and routing."""

    float32 = float = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@pytest.fixture(params=[torch.float32, torch.float64], ids=str)
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.dtype]:
    """Type of the computation in both models."""
    if request.param == torch.float64:
        for module in (modeling_flex_olmo, modeling_llama, modeling_rope_utils):
            monkeypatch.setattr(module, "torch", _DoubleTorch())
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


def names(config: RishConfig | MooshakConfig) -> dict[str, str]:
    """Names of the parameters in transformers, by our names."""
    last = f"layers.{config.num_layers + 1}"
    pairs = {
        "layers.0.token.weight": "model.embed_tokens.weight",
        f"{last}.norm.weight": "model.norm.weight",
        f"{last}.project.weight": "lm_head.weight",
    }
    for layer in range(config.num_layers):
        ours, theirs = f"layers.{layer + 1}", f"model.layers.{layer}"
        pairs |= {f"{ours}.{a}": f"{theirs}.{b}" for a, b in BLOCKS[type(config)].items()}
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
        flex_config = transformers.FlexOlmoConfig(**shape, **routing, output_router_logits=True)
        flex_config._experts_implementation = "eager"  # the grouped implementation does not support float64
        model = transformers.FlexOlmoForCausalLM(flex_config)
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
    model.to(dtype).eval()
    result = model.load_state_dict({theirs: weights[ours] for ours, theirs in names(c).items()}, strict=False)
    assert not result.missing_keys
    assert not result.unexpected_keys
    return model


@pytest.mark.parametrize(
    ("config", "rope"),
    [
        pytest.param(RISH, "default", id="rish"),
        pytest.param(replace(RISH, n_kv_head=6), "default", id="rish-all-heads"),
        pytest.param(replace(RISH, max_position=7), "dynamic", id="rish-dynamic"),
        pytest.param(MOOSHAK, "default", id="mooshak"),
    ],
)
def test_logits_and_gradients_equal_transformers(config: Any, rope: str, dtype: torch.dtype) -> None:
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-10}[dtype]
    model, tokens = make_model(config, dtype), make_tokens(config, length=13)
    other = twin(config, dict(model.named_parameters()), dtype, rope)
    results = [model(tokens, Context()), other(tokens).logits]
    for logits in results:
        F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
    ours, theirs = results
    assert (ours - theirs).abs().max() < tolerance * theirs.abs().max()
    gradients = {name: parameter.grad for name, parameter in other.named_parameters()}
    assert len(gradients) == len(names(config))
    for name, parameter in model.named_parameters():
        expected = gradients[names(config)[name]]
        assert (parameter.grad - expected).abs().max() < tolerance * max(1.0, expected.abs().max()), name


def test_balance_loss_of_one_layer_equals_transformers() -> None:
    """For each sequence, without the padding."""
    config = replace(RISH, num_layers=1, aux_coefficient=1.0)
    model, tokens = make_model(config), make_tokens(config)
    other = twin(config, dict(model.named_parameters()), torch.float64)
    lengths = torch.tensor([12, 7])
    for row in (0, 1):
        context = Context(lengths=lengths, training=TrainingContext(aux_weights=torch.eye(2, dtype=torch.float64)[row]))
        model(tokens, context)
        expected = other(tokens[row : row + 1, : lengths[row]]).aux_loss.detach()
        assert float(context.training.stats[1, 0].aux) == pytest.approx(
            float(expected), rel=1e-6
        )  # fp32 in transformers
