"""Training of every family is independent of the layout; `test_parity.py` tests fira in more detail.

Here fira has routing noise, a capacity limit and load balancing by a bias; mooshak and blues have all options.
"""

import functools
import json
import tempfile
from typing import Any

import numpy as np
import pytest

from fira import load_model
from fira.models.blues import BluesConfig
from fira.models.fira import FiraConfig
from fira.models.microrwkv import MicroRWKVConfig
from fira.models.mooshak import MooshakConfig
from fira.models.registry import to_document
from fira.models.rish import RishConfig
from tests.launch import run_function

pytestmark = pytest.mark.slow  # the fast tests of parity train fira only

SMALL = {"vocab_size": 61, "seq_len": 13, "d_model": 24, "num_layers": 2}
OPTIONS: dict[str, Any] = {
    "softcap": 2.0,
    "qk_norm": True,
    "relu_squared": True,
    "value_embeddings": True,
    "residual_scalars": True,
}
MODELS = {
    "rish": RishConfig(**SMALL, n_head=6, n_kv_head=2, d_ff=20, num_experts=4, top_k=2, max_position=10),
    "mooshak": MooshakConfig(**SMALL, n_head=6, d_ff=20, norm_order="post", **OPTIONS),
    "blues": BluesConfig(**SMALL, n_head=6, n_kv_head=2, d_ff=20, noise=0.5, dropout=0.1, **OPTIONS),
    "fira": FiraConfig(
        **SMALL, n_head=3, d_ff=20, noise=0.3, balance_rate=0.05, capacity_factor=0.9, switch_coefficient=0.1
    ),
    "microrwkv": MicroRWKVConfig(**SMALL, n_head=3, n_group=2, window=5, d_moe=10, top_k=2, aux_coefficient=0.1),
}
# Saved on one layout and resumed on others: a tied weight with all options, and a router bias.
RESHARDED = ["blues", "fira"]
ONE = [1, 1, 1]
OTHER_SCHEDULES = ["gpipe", "interleaved", "zb-h1", "zb-v"]
PADDED = {"microbatch": 2}  # 5 sequences
EXACT = {"microbatch": 2, "dtype": "float64"}


def sharded(name: str, pp: int, dp: int) -> list[int]:
    """A layout in which ep is dp if the family has experts."""
    return [pp, dp, dp if hasattr(MODELS[name], "num_experts") else 1]


def case(name: str, layout: list[int], **settings: Any) -> str:
    return json.dumps({"model": to_document(MODELS[name]), "layout": layout, "steps": 3, **settings}, sort_keys=True)


def cases(name: str) -> list[str]:
    """All trainings of a family."""
    return [
        case(name, ONE),
        case(name, ONE, recompute=99),
        case(name, ONE, **EXACT),
        case(name, ONE, **PADDED),
        case(name, ONE, **EXACT, devices=2, recompute=99),
        case(name, [2, 1, 1]),
        *(case(name, [2, 1, 1], schedule=schedule) for schedule in OTHER_SCHEDULES),
        *(case(name, layout, **p) for layout in ([1, 2, 1], sharded(name, 1, 2)) for p in (EXACT, PADDED)),
        *(case(name, sharded(name, 2, 2), **p, schedule="zb-v") for p in (EXACT, PADDED)),
        case(name, [2, 1, 1], **EXACT, devices=2),
    ]


@functools.cache
def job(ranks: int) -> list[Any]:
    """All cases with this number of ranks, in one job; on two ranks, models are also saved and resumed."""
    selected = [json.loads(n) for name in MODELS for n in cases(name) if np.prod(json.loads(n)["layout"][:2]) == ranks]
    if ranks != 2:
        return run_function(ranks, "tests.ranks.family_ranks", "train_all", timeout=170, cases=selected)
    with tempfile.TemporaryDirectory() as folder:
        models = {f"{folder}/{name}": to_document(MODELS[name]) for name in RESHARDED}
        resharded = {"models": models, "layouts": [[2, 1, 1], [1, 2, 2]]}
        by_rank = run_function(
            2, "tests.ranks.family_ranks", "train_and_reshard", timeout=170, cases=selected, **resharded
        )
        for name, one in zip(RESHARDED, by_rank[0]["resharded"], strict=True):
            one["loaded"] = load_model(f"{folder}/{name}")
        return by_rank


@functools.cache
def results(ranks: int) -> dict[str, Any]:
    """The results of all cases with this number of ranks, which must be equal on all of them."""
    names = [n for name in MODELS for n in cases(name) if np.prod(json.loads(n)["layout"][:2]) == ranks]
    merged = {}
    for name, *ranks_results in zip(names, *(one["trained"] for one in job(ranks)), strict=True):
        assert all(one["steps"] == ranks_results[0]["steps"] for one in ranks_results)
        weights = {key: value for one in ranks_results for key, value in one["weights"].items()}
        merged[name] = {**ranks_results[0], "weights": weights}
    return merged


def result(case: str) -> dict[str, Any]:
    layout = json.loads(case)["layout"]
    return results(layout[0] * layout[1])[case]


def distance(one: str, other: str) -> float:
    """The largest relative difference of loss, auxiliary loss and gradient norm in any step."""
    a, b = np.array(result(one)["steps"]), np.array(result(other)["steps"])
    return float((abs(a - b) / np.maximum(abs(b), 1e-300)).max())


@pytest.mark.parametrize("name", MODELS)
def test_pipelines_and_recompute_are_bitwise_identical(name: str) -> None:
    plain = result(case(name, ONE))
    assert result(case(name, [2, 1, 1])) == plain
    for schedule in OTHER_SCHEDULES:
        assert result(case(name, [2, 1, 1], schedule=schedule)) == plain, schedule
    assert result(case(name, ONE, recompute=99)) == plain


def assert_close_to_one_rank(name: str, layout: list[int], **settings: Any) -> None:
    """torchgpipe divides micro-batches, so that products have other shapes."""
    plain, other = case(name, ONE, **EXACT), case(name, layout, **EXACT, **settings)
    assert distance(other, plain) < 1e-12, (layout, settings)
    for key, values in result(plain)["experts"].items():
        np.testing.assert_allclose(result(other)["experts"][key], values, rtol=1e-12, err_msg=key)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("precision", [EXACT, PADDED], ids=["float64", "float32"])
def test_replicas_and_expert_shards_are_bitwise_identical_to_one_rank(name: str, precision: dict[str, Any]) -> None:
    plain = result(case(name, ONE, **precision))
    assert result(case(name, [1, 2, 1], **precision)) == plain
    assert result(case(name, sharded(name, 1, 2), **precision)) == plain
    assert result(case(name, sharded(name, 2, 2), **precision, schedule="zb-v")) == plain
    assert np.any(plain["experts"]["dropped"]) == (name == "fira")


@pytest.mark.parametrize("name", MODELS)
def test_torchgpipe_equals_one_rank(name: str) -> None:
    assert distance(case(name, ONE, **EXACT), case(name, ONE)) > 1e-12  # the comparison detects the precision of fp32
    assert_close_to_one_rank(name, ONE, devices=2, recompute=99)
    assert_close_to_one_rank(name, [2, 1, 1], devices=2)


@pytest.mark.parametrize("name", RESHARDED)
def test_checkpoint_resumes_on_every_layout(name: str) -> None:
    resharded = dict(zip(RESHARDED, job(2)[0]["resharded"], strict=True))[name]
    uninterrupted, same, other = resharded["continued"]
    assert same == other == uninterrupted
    weights = [name for name in resharded["names"] if not name.startswith("exp_avg")]
    assert sorted(resharded["loaded"].weights()) == weights
    assert not any(tensor.is_meta for tensor in resharded["loaded"].parameters())


def test_tied_weight_is_saved_once_and_bias_is_kept() -> None:
    tied, biased = (one["loaded"] for one in job(2)[0]["resharded"])
    assert "layers.3.project.weight" not in tied.weights()
    assert tied.layers[-1].project.weight is tied.layers[0].token.weight
    assert biased.layers[1].moe.router.balance.abs().max() > 0
