"""rish and mooshak compared with FlexOlmo, OLMoE and Llama of transformers."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import modeling_rope_utils
from transformers.models.flex_olmo import modeling_flex_olmo
from transformers.models.llama import modeling_llama
from transformers.models.olmoe import modeling_olmoe

from fira.huggingface import FiraLMConfig, FiraLMForCausalLM, RishAICausalLM, RishAIConfig
from fira.models.registry import to_document
from fira.nn.context import Context, TrainingContext
from tests.fira.models.small_families import make_model, make_tokens
from tests.fira.models.transformers_twin import MOOSHAK, OLMOE, RISH, names, twin


class _DoubleTorch:
    """The module torch with float64 as `float32`, the type in which transformers computes norms, angles and routing."""

    float32 = float = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@pytest.fixture(params=[torch.float32, torch.float64], ids=str)
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.dtype]:
    """Type of the computation in both models."""
    if request.param == torch.float64:
        for module in (modeling_flex_olmo, modeling_llama, modeling_olmoe, modeling_rope_utils):
            monkeypatch.setattr(module, "torch", _DoubleTorch())
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("config", "rope"),
    [
        pytest.param(RISH, "default", id="rish"),
        pytest.param(replace(RISH, n_kv_head=6), "default", id="rish-all-heads"),
        pytest.param(replace(RISH, max_position=7), "dynamic", id="rish-dynamic"),
        pytest.param(OLMOE, "default", id="olmoe"),
        pytest.param(replace(OLMOE, max_position=7), "dynamic", id="olmoe-dynamic"),
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


@pytest.mark.parametrize("length", [5, 13, 30])
@pytest.mark.parametrize("dtype", [torch.float64], indirect=True)
def test_dynamic_scaling_of_rish_equals_transformers(length: int, dtype: torch.dtype) -> None:
    """Within `max_position_embeddings`, beyond it, and beyond `factor` times as many tokens."""
    names = {"hidden_size": 24, "num_attention_heads": 6, "num_key_value_heads": 2, "num_hidden_layers": 2}
    sizes = {"vocab_size": 31, "intermediate_size": 20, "num_experts": 5, "num_experts_per_tok": 3, "rope_theta": 100.0}
    scaling = {"rope_type": "dynamic", "factor": 4.0}
    plain, scaled = (
        RishAICausalLM(RishAIConfig(**names, **sizes, max_position_embeddings=7, rope_scaling=parameters)).to(dtype)
        for parameters in (None, scaling)
    )
    plain.load_state_dict(scaled.state_dict())
    config = replace(RISH, max_position=7, rope_factor=4.0, rope_theta=100.0)
    other = twin(config, dict(scaled.model.named_parameters()), dtype, "dynamic")
    tokens = make_tokens(config, length=length)
    expected = other(tokens).logits
    plain.eval(), scaled.eval()
    assert (scaled(tokens).logits - expected).abs().max() < 1e-10 * expected.abs().max()
    assert scaled.config.max_position_embeddings == other.config.max_position_embeddings == 7
    assert torch.equal(plain(tokens).logits, scaled(tokens).logits) == (length <= 7)


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


def test_loss_of_shifted_labels_equals_that_of_llama() -> None:
    tokens = make_tokens(MOOSHAK, length=13)
    model = FiraLMForCausalLM(FiraLMConfig(shape=to_document(MOOSHAK))).train()
    other = twin(MOOSHAK, dict(model.model.named_parameters()), torch.float32).train()
    shifted = tokens.roll(3, 1).where(tokens % 5 != 0, -100)
    for count in (None, 40):
        losses = [m(tokens, labels=tokens, shift_labels=shifted, num_items_in_batch=count).loss for m in (model, other)]
        torch.testing.assert_close(*losses)
        assert losses[0] != model(tokens, labels=tokens, num_items_in_batch=count).loss
