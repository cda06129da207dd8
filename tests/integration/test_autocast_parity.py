"""Training with weights that are cast once per step is bitwise identical to training by plain autocast.

Four sequences per step, by default as four micro-batches; fp16 with loss scaling.
"""

import functools
from itertools import product
from typing import Any

import pytest

from fira.models.registry import to_document
from tests.integration.test_family_parity import MODELS, sharded
from tests.launch import run_function

pytestmark = [pytest.mark.slow, pytest.mark.timeout(250)]  # the first test waits for all trainings

DTYPES = ("bfloat16", "float16")


def case(name: str, layout: list[int], autocast: str, **settings: Any) -> dict[str, Any]:
    """Keyword arguments of `autocast_ranks.train`."""
    return {"model": to_document(MODELS[name]), "layout": layout, "autocast": autocast, **settings}


ONE_RANK: list[dict[str, Any]] = [
    {"recompute": 99},
    {"recompute": 99, "devices": 2},
    {"devices": 2, "microbatch": 4, "steps": 1},
]
SCHEDULES: list[dict[str, Any]] = [
    *({"schedule": schedule} for schedule in ("interleaved", "zb-2p", "zb-v")),
    {"schedule": "zb-h1", "recompute": 1},
]
DIVIDED = [("blues", "bfloat16"), ("fira", "float16")]  # tied embeddings, and a sparse mixture
# By the name of a test: the number of ranks and the trainings
CASES = {
    "scaling": (1, [case(name, [1, 1, 1], "float16", steps=6) for name in MODELS]),
    "one rank": (
        1,
        [case(name, [1, 1, 1], autocast) for name, autocast in product(MODELS, DTYPES)]
        + [case(name, [1, 1, 1], "bfloat16", **option) for name, option in product(MODELS, ONE_RANK)],
    ),
    "pipeline": (2, [case(name, [2, 1, 1], autocast) for name, autocast in product(MODELS, DTYPES)]),
    "schedules": (2, [case(name, [2, 1, 1], "bfloat16", **option) for name, option in product(MODELS, SCHEDULES)]),
    "parameters": (2, [case(name, [1, 2, 1], autocast, shard="parameters") for name, autocast in DIVIDED]),
    "experts": (2, [case(name, sharded(name, 1, 2), autocast) for name, autocast in product(MODELS, DTYPES)]),
}


@functools.cache
def job(ranks: int) -> dict[str, list[Any]]:
    """The results of each rank in all trainings on this number of ranks, in one job, by the name of the test."""
    cases = {name: trainings for name, (its_ranks, trainings) in CASES.items() if its_ranks == ranks}
    by_rank = run_function(ranks, "tests.ranks.autocast_ranks", "compare_all", timeout=240, cases=cases)
    return {name: [results[name] for results in by_rank] for name in cases}


def compare(name: str) -> list[dict[str, Any]]:
    """Train in both forms, compare losses, norms, weights and gradients of all ranks, and return those of rank 0."""
    ranks, cases = CASES[name]
    by_rank = job(ranks)[name]
    for results in by_rank:
        for arguments, (once, plain) in zip(cases, results, strict=True):
            assert once == plain, arguments
    return [once for once, _ in by_rank[0]]


def test_loss_scaling_skips_the_same_steps() -> None:
    skipped = [one["skipped"] for one in compare("scaling")]
    assert any(any(steps) for steps in skipped)
    assert not any(steps[-1] for steps in skipped)


def test_one_rank() -> None:
    """In bf16 and fp16, with recomputation, and over two local devices.

    Without recomputation, the backward of all chunks of torchgpipe is one. Their gradients are added to `.grad` one
    after another, but by plain autocast after their sum. The first micro-batch of a step is the same in both forms.
    """
    compare("one rank")


@pytest.mark.parametrize("name", ["pipeline", "schedules", "parameters", "experts"])
def test_two_ranks(name: str) -> None:
    compare(name)
