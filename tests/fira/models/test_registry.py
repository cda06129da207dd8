"""Presets, JSON documents of configs, and invalid configs."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from fira.models.language_model import LanguageModel
from fira.models.registry import PRESETS, build, from_document, to_document
from fira.nn.moe.layer import MoE
from tests.fira.models.small_families import CONFIGS, MICRORWKV, MOOSHAK, RISH, families


def num_active_parameters(model: LanguageModel) -> int:
    """The number of parameters that are used for one token, with k experts per MoE layer."""
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    unused = sum(
        p[0].numel() * (moe.num_experts - moe.router.top_k) for moe in layers for p in moe.experts.parameters()
    )
    return model.num_parameters() - unused


@pytest.mark.parametrize(
    ("preset", "changes", "total", "active"),
    [
        ("rish-base", {"n_kv_head": 32}, 33_270_665_216, 24_613_621_760),
        ("rish-base", {}, 32_465_260_544, 23_808_217_088),
        ("mooshak-base", {}, 2_144_407_552, 2_144_407_552),
        ("mooshak-base", {"norm_order": "post"}, 2_144_407_552, 2_144_407_552),
        ("blues-base", {}, 45_930_240, 40_621_824),
        ("microrwkv-base", {}, 157_472_864, 157_472_864),
    ],
)
def test_number_of_parameters_of_presets(preset: str, changes: dict[str, Any], total: int, active: int) -> None:
    with torch.device("meta"):
        model = build(replace(PRESETS[preset], **changes))
    assert model.num_parameters() == total
    assert num_active_parameters(model) == active


@families
def test_config_is_restored_from_json(name: str) -> None:
    assert from_document(to_document(CONFIGS[name])) == CONFIGS[name]


def test_fractional_top_k_is_restored_from_json() -> None:
    config = replace(PRESETS["fira-tiny"], top_k=0.8, dropout=0.3)
    assert from_document(to_document(config)) == config


@pytest.mark.parametrize(("top_k", "active"), [(1, 162_771_504), (2, 219_440_688), (3, 276_109_872)])
def test_number_of_parameters_of_fira_base(top_k: int, active: int) -> None:
    with torch.device("meta"):
        model = build(replace(PRESETS["fira-base"], top_k=top_k))
    assert model.num_parameters() == 332_779_056
    assert num_active_parameters(model) == active


def test_invalid_configs_raise() -> None:
    for config, message in (
        (replace(MOOSHAK, norm_order="both"), "norm_order"),
        (replace(MICRORWKV, n_head=7), "not divisible"),
        (replace(RISH, n_kv_head=4), "n_kv_head"),
        (replace(RISH, n_head=8), "odd"),
    ):
        with pytest.raises(Exception, match=message):
            build(config)
