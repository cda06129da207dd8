"""Training of adapters against a plain loop over dense matrices in float64, on every kind of layout."""

import functools
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch

from fira.models.registry import to_document
from tests.integration.test_reference_training import MODELS, assembled
from tests.launch import run_function
from tests.reference_lora import train
from tests.reference_training import Settings, token_ids

pytestmark = pytest.mark.slow

ALL, UNTIED = "rank=3,alpha=6,targets=attention+experts+head", "rank=3,alpha=6,targets=attention+experts"
SETTINGS = Settings(clip=0.1, steps=2, batch=6, peak=1e-2, warmup=1)
SCALE = 2.0


def case(name: str, layout: list[int], lora: str = ALL, **options: Any) -> dict[str, Any]:
    """A training with three micro-batches on each replica."""
    model, settings = to_document(MODELS[name]), asdict(SETTINGS)
    microbatch = SETTINGS.batch // layout[1] // 3
    return {"model": model, "lora": lora, "settings": settings, "layout": layout, "microbatch": microbatch, **options}


CASES = {
    1: [
        case("fira", [1, 1, 1]),
        case("rish", [1, 1, 1]),
        case("mooshak", [1, 1, 1]),
        case("blues", [1, 1, 1], UNTIED),
        case("fira", [1, 1, 1], recompute=1),
        case("fira", [1, 1, 1], devices=2, recompute=1),
        case("fira", [1, 1, 1], "rank=1,alpha=2,targets=head"),
    ],
    2: [
        case("fira", [2, 1, 1]),
        case("fira", [1, 2, 1]),
        case("fira", [1, 2, 2]),
        case("fira", [1, 2, 1], shard="parameters"),
        case("blues", [1, 2, 1], UNTIED, shard="parameters", recompute=1),
        case("fira", [2, 1, 1], schedule="zb-h1"),
        case("rish", [2, 1, 1], schedule="zb-v"),
        case("blues", [2, 1, 1], UNTIED),
        case("microrwkv", [2, 1, 1], UNTIED, schedule="interleaved"),
        case("fira", [2, 1, 1], "rank=1,alpha=2,targets=head", schedule="zb-h1"),
    ],
    4: [case("fira", [2, 2, 2]), case("rish", [2, 2, 2], schedule="zb-h1", shard="parameters")],
}
# In fp32, with the same micro-batch size: compared with one rank instead of the loop
SINGLE = {"settings": asdict(replace(SETTINGS, batch=4)), "microbatch": 1, "dtype": "float32"}
LAYOUTS: list[dict[str, Any]] = [
    {"layout": [1, 4, 4]},
    {"layout": [2, 2, 2], "schedule": "zb-h1"},
    {"layout": [4, 1, 1], "recompute": 1},
]
FAMILIES = ("fira", "rish")
SINGLES: dict[int, list[dict[str, Any]]] = {
    1: [case(name, **{"layout": [1, 1, 1], **SINGLE}) for name in FAMILIES],
    2: [],
    4: [case(name, **{**layout, **SINGLE}) for name in FAMILIES for layout in LAYOUTS],
}


@functools.cache
def job(ranks: int) -> list[list[dict[str, Any]]]:
    """All cases of one number of ranks, and then the cases in fp32, in one job: [rank][case]."""
    cases = CASES[ranks] + SINGLES[ranks]
    return run_function(ranks, "tests.ranks.lora_ranks", "train_all", timeout=170, cases=cases)


@pytest.mark.parametrize(
    ("ranks", "number"), [(ranks, number) for ranks, cases in CASES.items() for number in range(len(cases))]
)
def test_training_of_adapters_equals_that_of_dense_matrices(ranks: int, number: int) -> None:
    """Loss, auxiliary loss, gradient norm, gradients of adapters, and adapters after two steps, to 1e-12."""
    settings, results = CASES[ranks][number], [rank[number] for rank in job(ranks)]
    family = settings["model"]["family"]
    config = MODELS[family]
    base, initial = assembled(results, "base"), assembled(results, "initial")
    ids = token_ids(config.vocab_size, SETTINGS.windows * config.seq_len + 1)
    expected = train(family, config, base, initial, SCALE, ids, SETTINGS)
    for rank in results:
        np.testing.assert_allclose(rank["steps"], expected["steps"], rtol=1e-12)
    for kind in ("gradients", "weights"):
        values = assembled(results, kind)
        assert values.keys() == expected[kind].keys()
        for name, value in values.items():
            torch.testing.assert_close(value, expected[kind][name], rtol=1e-12, atol=1e-12, msg=f"{kind} of {name}")
    assert any(norm > SETTINGS.clip for *_, norm in expected["steps"])
    assert all(gradient.abs().max() > 0 for gradient in expected["gradients"].values())


@pytest.mark.parametrize(("ranks", "number"), [(1, 0), (4, 0)])
def test_only_adapters_have_gradients_norms_and_moments(ranks: int, number: int) -> None:
    for result in (rank[number] for rank in job(ranks)):
        adapters = result["initial"].keys()
        assert set(result["trained"]["gradients"]) == set(result["trained"]["moments"]) == set(adapters)
        assert all(".lora" in name for name in [*adapters, *result["trained"]["norms"]])
        assert not [name for name in result["base"] if ".lora" in name]


def test_results_are_bitwise_identical_on_all_layouts() -> None:
    """Losses, norms and adapters."""
    alone, spread = ([rank[len(CASES[ranks]) :] for rank in job(ranks)] for ranks in (1, 4))
    (expected,) = alone
    assert len(spread[0]) == len(FAMILIES) * len(LAYOUTS)
    for number, results in enumerate(zip(*spread, strict=True)):
        single = expected[number // len(LAYOUTS)]
        weights = assembled([single], "weights")
        assert all(rank["steps"] == single["steps"] for rank in results)
        assert all(torch.equal(value, weights[name]) for name, value in assembled([*results], "weights").items())
