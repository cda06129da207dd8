"""Small models of the families in float64, and a chi-square statistic, for the tests of several modules."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fira.models.registry import PRESETS, build
from tests.fira.small_model import perturbed


def small(family: str, **changes: Any) -> Any:
    """A model of a family whose next token depends much on those before, in double precision."""
    sizes = {"vocab_size": 50, "seq_len": 12, "d_model": 16, "n_head": 2, "num_layers": 2}
    sizes |= {"n_kv_head": 1} if family in ("rish", "blues") else {}
    sizes |= {"d_moe": 8, "window": 4} if family == "microrwkv" else {"d_ff": 24}
    torch.manual_seed(0)
    return perturbed(build(replace(PRESETS[f"{family}-tiny"], **sizes | changes)).double(), 0.4).eval()


def chi_square(counts: Tensor, chances: Tensor) -> float:
    expected = chances.double() * counts.sum()
    assert expected.min() > 3
    return float(((counts - expected) ** 2 / expected).sum())
