"""Small models of the families, for the tests of several modules."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fira.models.blues import BluesConfig
from fira.models.fira import FiraConfig
from fira.models.language_model import LanguageModel
from fira.models.microrwkv import MicroRWKVConfig
from fira.models.mooshak import MooshakConfig
from fira.models.registry import build
from fira.models.rish import RishConfig
from tests.fira.small_model import perturbed

SMALL: dict[str, Any] = {"vocab_size": 31, "seq_len": 24, "d_model": 24, "num_layers": 2}
RISH = RishConfig(**SMALL, n_head=6, n_kv_head=2, d_ff=20, num_experts=5, top_k=2, max_position=9, rope_factor=2.0)
MOOSHAK = MooshakConfig(**SMALL, n_head=6, d_ff=20)
BLUES = BluesConfig(**SMALL, n_head=6, n_kv_head=2, d_ff=20, top_k=2, dropout=0.0, aux_coefficient=0.3)
MICRORWKV = MicroRWKVConfig(**SMALL, n_head=3, n_group=2, window=5, d_moe=10, top_k=2, aux_coefficient=0.1, softcap=2.0)
FIRA = FiraConfig(**SMALL, n_head=6, d_ff=20, dropout=0.0)
OPTIONS: dict[str, Any] = {"softcap": 2.0, "relu_squared": True, "value_embeddings": True, "residual_scalars": True}

CONFIGS = {
    "rish": RISH,
    "rish-pre": replace(RISH, norm_order="pre"),
    "mooshak": MOOSHAK,
    "mooshak-post": replace(MOOSHAK, norm_order="post", n_kv_head=3),
    "blues": BLUES,
    "blues-public": replace(BLUES, gate_before_norm=True),
    "microrwkv": MICRORWKV,
    "fira-options": replace(FIRA, **OPTIONS, qk_norm=True),
    "rish-options": replace(RISH, **OPTIONS),
    "mooshak-options": replace(MOOSHAK, **OPTIONS, qk_norm=True, n_kv_head=3),
    "blues-options": replace(BLUES, **OPTIONS, qk_norm=True),
}


families = pytest.mark.parametrize("name", CONFIGS)


def make_model(config: Any, dtype: torch.dtype = torch.float64) -> LanguageModel:
    """A model whose parameters all differ from special initial values, such as a gain of one."""
    torch.manual_seed(0)
    return perturbed(build(config).to(dtype), 0.1).eval()


def make_tokens(config: Any, batch: int = 2, length: int = 12) -> Tensor:
    return torch.randint(config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(1))
