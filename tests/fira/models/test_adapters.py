"""Adapters in the models of all families: which matrices have them, and what they change."""

from dataclasses import replace

import pytest
import torch

from fira.errors import UserError
from fira.models.adapters import add_adapters
from fira.models.language_model import LanguageModel
from fira.models.registry import build
from fira.nn.context import Context
from fira.nn.init import initialise
from fira.nn.lora import Lora, adapter_names
from tests.fira.models import small_fira
from tests.fira.models.small_families import CONFIGS, MOOSHAK, make_model, make_tokens

MODELS = {**CONFIGS, "fira": small_fira.CONFIG}
# By family and target: the adapted weights of the first block or of the head, as in docs/post-training.md.
ADAPTED = {
    "fira": {
        "attention": [f"attention.{name}.weight" for name in "qkvo"],
        "experts": ["moe.experts.w1", "moe.experts.w2"],
        "head": ["project.weight"],
    },
    "rish": {
        "attention": [f"attention.{name}.weight" for name in "qkvo"],
        "experts": ["moe.experts.w1", "moe.experts.w2"],
        "head": ["project.weight"],
    },
    "mooshak": {
        "attention": [f"attention.{name}.weight" for name in "qkvo"],
        "experts": [f"mlp.w{number}.weight" for number in (1, 2, 3)],
        "head": ["project.weight"],
    },
    "blues": {
        "attention": [f"attention.{name}.weight" for name in "qkvo"],
        "experts": ["moe.experts.w1", "moe.experts.w2"],
    },
    "microrwkv": {
        "attention": [
            *(f"time_mix.{name}.weight" for name in "rkvgo"),
            *(f"channel_mix.{name}.weight" for name in "kvr"),
            *(f"sliding.{name}.weight" for name in "qkvo"),
            *(f"grouped.{name}.weight" for name in "qkvog"),
        ],
        "experts": ["experts.moe.experts.w1", "experts.project.weight"],
    },
}


def adapted(name: str, target: str) -> LanguageModel:
    model = make_model(MODELS[name])
    add_adapters(model, Lora(2, 4.0, (target,)))
    for index, layer in enumerate(model.layers):
        weights = {n: p.clone() for n, p in layer.named_parameters() if not p.requires_grad}
        initialise(layer, f"layers.{index}", 3)
        layer.load_state_dict(weights, strict=False)
    return model


@pytest.mark.parametrize(("name", "target"), [(name, target) for name in ADAPTED for target in ADAPTED[name]])
def test_matrices_of_a_target_have_adapters_and_all_else_is_frozen(name: str, target: str) -> None:
    model, plain = adapted(name, target), make_model(MODELS[name])
    layer = len(model.layers) - 1 if target == "head" else 1
    trained = {n.partition(f"layers.{layer}.")[2] for n, p in model.named_parameters() if p.requires_grad}
    assert trained - {""} == {n for weight in ADAPTED[name][target] for n in adapter_names(weight)}
    before = dict(plain.named_parameters())
    frozen = {n: p for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen.keys() == before.keys()
    tokens = make_tokens(model.config, length=9)
    assert torch.equal(model(tokens, Context()), plain(tokens, Context()))
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.3)
    with_adapters = model(tokens, Context())
    assert (with_adapters - plain(tokens, Context())).abs().max() > 1e-3
    parameters, scale = dict(model.named_parameters()), 2.0
    with torch.no_grad():
        for weight, value in before.items():
            a, b = (parameters.get(n) for n in adapter_names(weight))
            if a is not None and b is not None:
                value += scale * b @ a
    torch.testing.assert_close(with_adapters, plain(tokens, Context()), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("config", [CONFIGS["blues"], CONFIGS["microrwkv"], replace(MOOSHAK, tied=True)])
def test_adapter_of_a_tied_head_is_refused(config: object) -> None:
    with pytest.raises(UserError, match=r"head of this (blues|microrwkv|mooshak) shares its weight.*; omit head"):
        add_adapters(build(config), Lora.parse("rank=2,alpha=4,targets=attention+head"))


def test_more_flops_by_those_of_the_adapters() -> None:
    """For every adapted matrix r · (in + out) products per token, for experts times the number of chosen ones."""
    for name, target in (("rish", "experts"), ("rish", "attention"), ("microrwkv", "experts")):
        model, plain = adapted(name, target), make_model(MODELS[name])
        added = sum(
            2.0 * p[0].numel() * model.config.top_k if p.dim() == 3 else 2.0 * p.numel()
            for p in model.layers[1].parameters()
            if p.requires_grad
        )
        flops = [m.layers[1].flops_per_token(12) for m in (model, plain)]
        assert flops[0] - flops[1] == pytest.approx(added)
