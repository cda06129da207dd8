"""Loss, auxiliary loss, gradient norm and weights do not depend on the layout.

A case is the keyword arguments of `parity_ranks.train`, as JSON. All cases of one number of ranks run in one job, and
their references on one rank in another.
"""

import functools
import json
from itertools import product
from typing import Any

import numpy as np
import pytest

from fira.models.mooshak import MooshakConfig
from fira.models.registry import to_document
from fira.parallel.parallelize import EVERY_BLOCK
from tests.launch import run_function

ONE = [1, 1, 1]

pytestmark = pytest.mark.timeout(420)  # the first test of a number of ranks waits for all their cases


def case(layout: list[int], **settings: Any) -> str:
    return json.dumps({"layout": layout, **settings}, sort_keys=True)


def single_rank(name: str) -> str:
    """The same training on one rank and one device, without recomputation."""
    kept = ("dropout", "dtype", "microbatch", "layers", "d_ff", "steps", "batch", "optimizer", "model")
    return case(ONE, **{key: value for key, value in json.loads(name).items() if key in kept})


def in_line(name: str) -> str:
    """The same training with the experts' exchange in one part."""
    return json.dumps(json.loads(name) | {"parts": 1}, sort_keys=True)


# 5 sequences of 13 tokens: 5 micro-batches of 1, or 3 of 2 with the last one padded; neither number is divisible by dp.
LONG = case([2, 1, 1], steps=20)
PIPELINES = [
    case([stages, 1, 1], schedule=schedule, dropout=dropout, microbatch=microbatch)
    for stages, schedule, (dropout, microbatch) in product([2, 4], ["gpipe", "1f1b"], [(0.0, 1), (0.1, 1), (0.1, 2)])
] + [
    case([ranks, 1, 1], schedule=schedule, dropout=0.1, layers=6)  # two stages for each of four ranks
    for ranks, schedule in product([2, 4], ["interleaved", "zb-h1", "zb-2p", "zb-v"])
]
PIPELINES += [
    case([ranks, 1, 1], schedule="dualpipev", dropout=0.1, layers=6, batch=batch)
    for ranks, batch in product([2, 4], [3, 5, 8])
]
SPREAD = [
    case(layout, dropout=dropout, dtype=dtype, microbatch=microbatch, schedule=schedule)
    for layout, (dropout, dtype, microbatch, schedule) in product(
        [[1, 2, 1], [1, 4, 1], [1, 2, 2], [1, 4, 4], [2, 2, 2]],
        [(0.0, "float32", 1, "1f1b"), (0.1, "float32", 2, "gpipe"), (0.1, "float64", 1, "1f1b")],
    )
] + [case([2, 2, 2], dropout=0.1, dtype="float64", schedule=s) for s in ("interleaved", "zb-h1", "zb-v", "dualpipev")]
SPREAD += [case([1, 2, 1], dtype="float64", steps=4, d_ff=1500)]  # experts' gradients of more than a bucket
SPREAD += [case([1, 2, 2], dropout=0.1, microbatch=m, d_ff=19) for m in (1, 2)]  # widths that do not fill vectors
LOCAL = [
    case(layout, devices=devices, dropout=dropout, recompute=recompute, microbatch=4, dtype="float64")
    for layout, devices, dropout, recompute in product([ONE], [2, 4], [0.0, 0.1], [0, EVERY_BLOCK])
] + [
    case([2, 1, 1], devices=2, dropout=0.1, recompute=EVERY_BLOCK, microbatch=2, dtype="float64"),
    case([2, 1, 1], devices=2, dropout=0.1, microbatch=2, dtype="float64", schedule="zb-v"),
    case([1, 2, 2], devices=2, dropout=0.1, recompute=EVERY_BLOCK, microbatch=2, dtype="float64"),
]
RECOMPUTED = [case(ONE, recompute=EVERY_BLOCK, dropout=0.1)] + [
    case(layout, recompute=blocks, dropout=0.1, schedule=schedule)
    for layout, blocks, schedule in [
        ([2, 1, 1], EVERY_BLOCK, "1f1b"),
        ([2, 1, 1], EVERY_BLOCK, "zb-v"),
        ([2, 1, 1], 1, "1f1b"),
        ([2, 1, 1], 1, "zb-h1"),
        ([2, 2, 2], EVERY_BLOCK, "1f1b"),
    ]
]
EXCHANGED = [  # widths of whole vectors, because on a CPU the rounding of the last elements of a tensor may differ
    case(layout, dropout=0.1, parts=2, dtype="float64", d_ff=32, reduction="plain", **settings)
    for layout, settings in [
        ([1, 2, 2], {"microbatch": 2, "recompute": EVERY_BLOCK}),
        ([2, 2, 2], {"schedule": "zb-h1"}),
        ([2, 2, 2], {"schedule": "zb-v"}),
    ]
]
MUON = [
    case(layout, dropout=0.1, optimizer={"optimizer": "muon", "cautious_decay": cautious}, **settings)
    for layout, cautious, settings in [
        ([2, 1, 1], False, {}),
        ([1, 2, 1], True, {}),
        ([1, 2, 2], False, {"d_ff": 19}),  # matrices that do not fill vectors
        ([2, 2, 2], True, {}),
        ([1, 4, 2], False, {"d_ff": 19}),
        ([2, 2, 1], False, {"schedule": "zb-v", "layers": 6}),
        ([1, 4, 4], False, {"dtype": "float64"}),
    ]
]
SCALED = [
    case(layout, dropout=0.1, optimizer={"embedding_lr_scale": 3.0, "router_lr_scale": 0.25}, **settings)
    for layout, settings in [([1, 2, 1], {"shard": "parameters"}), ([2, 2, 2], {})]
]
TIED = MooshakConfig(  # with all options
    vocab_size=61,
    seq_len=13,
    d_model=12,
    num_layers=4,
    n_head=3,
    n_kv_head=3,
    d_ff=10,
    tied=True,
    softcap=2.0,
    qk_norm=True,
    relu_squared=True,
    value_embeddings=True,
    residual_scalars=True,
)
SHARDED = [
    case(layout, dropout=0.1, shard=shard, **settings)
    for layout, settings in [
        ([1, 2, 1], {"microbatch": 2}),
        ([1, 2, 2], {"optimizer": {"optimizer": "muon"}}),
        ([1, 4, 1], {"d_ff": 19}),
        ([1, 4, 2], {"optimizer": {"optimizer": "muon", "cautious_decay": True}}),
        ([2, 2, 2], {"schedule": "zb-h1"}),
        ([2, 2, 1], {"schedule": "zb-v", "layers": 6, "dtype": "float64"}),
        ([1, 4, 1], {"d_ff": 1500}),  # more than a bucket
        *((layout, {"model": to_document(TIED)}) for layout in ([1, 2, 1], [2, 2, 1])),
    ]
    for shard in ("optimizer", "parameters")
]
ALL = [LONG, *PIPELINES, *SPREAD, *LOCAL, *RECOMPUTED, *EXCHANGED, *map(in_line, EXCHANGED), *MUON, *SHARDED, *SCALED]


@functools.cache
def results(ranks: int) -> dict[str, dict[str, Any]]:
    """The results of all cases with this number of ranks, which must be equal on all of them."""
    return run(ranks, {name for name in ALL if ranks_of(name) == ranks})


@functools.cache
def references(ranks: int) -> dict[str, dict[str, Any]]:
    """What the cases with this number of ranks are compared with."""
    return run(1, {single_rank(name) for name in ALL if ranks_of(name) == ranks})


def run(ranks: int, cases: set[str]) -> dict[str, dict[str, Any]]:
    """Train all cases in one job and return the result of each."""
    names = sorted(cases)
    by_rank = run_function(
        ranks, "tests.ranks.parity_ranks", "train_all", timeout=400, cases=[json.loads(name) for name in names]
    )
    return {name: _merge([of_rank[i] for of_rank in by_rank]) for i, name in enumerate(names)}


def _merge(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    assert all(rank["steps"] == ranks[0]["steps"] for rank in ranks)
    weights: dict[str, str] = {}
    for rank in ranks:
        for name, digest in rank["weights"].items():
            assert weights.setdefault(name, digest) == digest, f"replicas differ in {name}"
    return {**ranks[0], "weights": weights}


def ranks_of(name: str) -> int:
    pp, dp, _ = json.loads(name)["layout"]
    return int(pp * dp)


def compared(names: list[str]) -> pytest.MarkDecorator:
    """Parametrize a test with cases; those on four ranks are slow."""
    marked = [pytest.param(name, marks=pytest.mark.slow) if ranks_of(name) > 2 else name for name in names]
    return pytest.mark.parametrize("name", marked)


def result(name: str) -> dict[str, Any]:
    return results(ranks_of(name))[name]


def reference(name: str) -> dict[str, Any]:
    return references(ranks_of(name))[single_rank(name)]


def distance(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest relative difference of loss, auxiliary loss and gradient norm in any step."""
    a, b = np.array(one["steps"]), np.array(other["steps"])
    return float((abs(a - b) / abs(b)).max())


@pytest.mark.slow
def test_training_reduces_the_loss():
    losses = np.array(reference(LONG)["steps"])[:, 0]
    assert losses[-1] < losses[0] - 0.3


@compared([LONG, *PIPELINES])
def test_pipeline_is_bitwise_identical_to_one_rank(name):
    assert result(name) == reference(name)


@compared(SPREAD)
def test_replicas_and_expert_shards_are_bitwise_identical_to_one_rank(name):
    assert result(name) == reference(name)


@compared(EXCHANGED)
def test_experts_exchanged_in_two_parts_are_bitwise_identical(name):
    assert result(name) == result(in_line(name))
    assert distance(result(name), reference(name)) < 1e-12


@compared(LOCAL)
def test_torchgpipe_equals_one_device(name):
    assert distance(result(name), reference(name)) < 1e-12


@compared(RECOMPUTED)
def test_recompute_is_bitwise_identical(name):
    assert result(name) == reference(name)


@compared(MUON)
def test_muon_is_bitwise_identical_to_one_rank(name):
    assert result(name) == reference(name)


@compared(SHARDED)
def test_replicas_that_divide_optimizer_or_parameters_are_bitwise_identical_to_one_rank(name):
    assert result(name) == reference(name)


@compared(SCALED)
def test_learning_rates_of_embeddings_and_routers_do_not_depend_on_the_layout(name):
    assert result(name) == reference(name)


def test_muon_and_factors_of_the_learning_rate_differ_from_adamw():
    """The comparison above would pass if the settings were not used."""
    assert distance(result(MUON[0]), result(RECOMPUTED[0])) > 1e-3
    assert distance(result(SCALED[0]), result(RECOMPUTED[0])) > 1e-3


def test_compared_numbers_depend_on_dropout():
    """The comparisons above would fail if dropout were missing."""
    assert distance(result(PIPELINES[0]), result(RECOMPUTED[0])) > 1e-3
