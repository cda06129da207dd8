"""Whole training runs against a plain loop in one process with torch's own optimizer, clipping and loss.

The reference computes in float64. fp32 runs are within 1e-6 of it, float64 runs within 1e-12. A batch has 4 · 8 tokens,
because the weights of auxiliary losses, one over that number, are stored in fp32 and must be exact for the latter.
"""

import functools
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch

from fira.models.blues import BluesConfig
from fira.models.fira import FiraConfig
from fira.models.microrwkv import MicroRWKVConfig
from fira.models.mooshak import MooshakConfig
from fira.models.registry import to_document
from fira.models.rish import RishConfig
from tests.launch import run_function
from tests.reference_models import Parameters
from tests.reference_training import Settings, token_ids, train, validate

SMALL = {"vocab_size": 61, "seq_len": 8, "d_model": 24, "num_layers": 2}
MODELS = {
    "fira": FiraConfig(**SMALL, n_head=3, d_ff=20, dropout=0.0, switch_coefficient=0.1, z_coefficient=0.01),
    "rish": RishConfig(**SMALL, n_head=6, n_kv_head=2, d_ff=20, num_experts=4, top_k=2, max_position=6),
    "mooshak": MooshakConfig(**SMALL, n_head=6, n_kv_head=3, d_ff=20),
    "blues": BluesConfig(**SMALL, n_head=6, n_kv_head=2, d_ff=20, noise=0.0, dropout=0.0, aux_coefficient=0.1),
    "microrwkv": MicroRWKVConfig(**SMALL, n_head=3, n_group=2, window=5, d_moe=10, top_k=2, aux_coefficient=0.1),
}
# About the median of the gradient norms, so that some steps are clipped and some are not.
CLIP = {"fira": 1.66, "rish": 2.01, "mooshak": 1.284, "blues": 9.2, "microrwkv": 1.518}
VALIDATION = 4 * 8 + 6  # tokens: five sequences, the last of five targets
TOLERANCE = {"float32": 1e-6, "float64": 1e-12}
ONE_RANK = [(name, [1, 1, 1], dtype) for name in MODELS for dtype in TOLERANCE]
TWO_RANKS = [
    ("fira", [2, 1, 1], "float64"),
    ("fira", [1, 2, 1], "float64"),
    ("fira", [1, 2, 2], "float64"),
    ("blues", [2, 1, 1], "float64"),
]
Case = tuple[str, list[int], str]


@functools.cache
def job(ranks: int) -> list[list[dict[str, Any]]]:
    """All cases of one number of ranks in one job: [rank][case]. Four sequences in micro-batches of 3: uneven."""
    cases = [
        {
            "model": to_document(MODELS[name]),
            "settings": asdict(Settings(CLIP[name])),
            "layout": layout,
            "dtype": dtype,
            "microbatch": 3,
            "validation": VALIDATION,
        }
        for name, layout, dtype in (ONE_RANK if ranks == 1 else TWO_RANKS)
    ]
    return run_function(ranks, "tests.ranks.reference_ranks", "train_all", timeout=170, cases=cases)


def trained(case: Case) -> list[dict[str, Any]]:
    """The result of each rank."""
    return (
        [rank[ONE_RANK.index(case)] for rank in job(1)]
        if case in ONE_RANK
        else [rank[TWO_RANKS.index(case)] for rank in job(2)]
    )


def assembled(ranks: list[dict[str, Any]], which: str) -> Parameters:
    """The whole model's weights in float64 from the rows that each rank holds; replicas hold the same values."""
    shards: dict[str, dict[int, Any]] = {}
    for rank in ranks:
        for name, (start, values) in rank[which].items():
            assert shards.setdefault(name, {}).setdefault(start, values) == values, f"replicas differ in {name}"
    return {
        name: torch.cat([torch.tensor(rows[start], dtype=torch.float64) for start in sorted(rows)])
        for name, rows in shards.items()
    }


@functools.cache
def reference(name: str) -> dict[str, Any]:
    """The plain loop's results from the initial weights of the run on one rank."""
    settings, config = Settings(CLIP[name]), MODELS[name]
    initial = assembled(trained((name, [1, 1, 1], "float64")), "initial")
    ids = token_ids(config.vocab_size, settings.windows * config.seq_len + 1)
    result = train(name, config, initial, ids, settings)
    held_out = token_ids(config.vocab_size, VALIDATION)
    return result | {"initial": initial, "val_loss": validate(name, config, result["weights"], held_out)}


@pytest.mark.parametrize("name", MODELS)
def test_some_steps_are_clipped_and_some_are_not(name: str) -> None:
    norms = np.array(reference(name)["steps"])[:, 2]
    assert 5 <= sum(norms > 1.01 * CLIP[name]) <= 15
    assert 5 <= sum(norms < 0.99 * CLIP[name]) <= 15


@pytest.mark.parametrize(
    ("name", "layout", "dtype"), [*ONE_RANK, *(pytest.param(*case, marks=pytest.mark.slow) for case in TWO_RANKS)]
)
def test_training_equals_the_plain_loop(name: str, layout: list[int], dtype: str) -> None:
    ranks, expected = trained((name, layout, dtype)), reference(name)
    tolerance = TOLERANCE[dtype]
    initial = assembled(ranks, "initial")
    assert all(torch.equal(initial[key], value) for key, value in expected["initial"].items())
    for rank in ranks:
        for column, what in enumerate(("loss", "auxiliary loss", "gradient norm", "learning rate")):
            ours, theirs = (np.array(run["steps"])[:, column] for run in (rank, expected))
            np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=0, err_msg=what)
        np.testing.assert_allclose(rank["val_loss"], expected["val_loss"], rtol=tolerance)
    weights = assembled(ranks, "weights")
    assert weights.keys() == expected["weights"].keys()
    for key, value in expected["weights"].items():
        if key.endswith("attention.k.bias"):
            continue  # softmax does not depend on it: its gradient is rounding error, which AdamW divides by its size
        torch.testing.assert_close(
            weights[key], value, rtol=tolerance, atol=tolerance, msg=lambda m, key=key: f"{key}: {m}"
        )
