"""Training with weights that are cast once per step is bitwise identical to training by plain autocast.

Four sequences per step, by default as four micro-batches; fp16 with loss scaling.
"""

from itertools import product
from typing import Any

import pytest

from fira.models.registry import to_document
from tests.integration.test_family_parity import MODELS, sharded
from tests.launch import run_function

DTYPES = ("bfloat16", "float16")


def case(name: str, layout: list[int], autocast: str, **settings: Any) -> dict[str, Any]:
    """Keyword arguments of `autocast_ranks.train`."""
    return {"model": to_document(MODELS[name]), "layout": layout, "autocast": autocast, **settings}


def compare(ranks: int, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Train in both forms, compare losses, norms, weights and gradients of all ranks, and return those of rank 0."""
    by_rank = run_function(ranks, "tests.ranks.autocast_ranks", "compare", timeout=240, cases=cases)
    for results in by_rank:
        for arguments, (once, plain) in zip(cases, results, strict=True):
            assert once == plain, arguments
    return [once for once, _ in by_rank[0]]


@pytest.mark.slow
@pytest.mark.timeout(250)
def test_pipeline() -> None:
    compare(2, [case(name, [2, 1, 1], autocast) for name, autocast in product(MODELS, DTYPES)])


@pytest.mark.slow
@pytest.mark.timeout(250)
def test_loss_scaling_skips_the_same_steps() -> None:
    results = compare(1, [case(name, [1, 1, 1], "float16", steps=6) for name in MODELS])
    skipped = [one["skipped"] for one in results]
    assert any(any(steps) for steps in skipped)
    assert not any(steps[-1] for steps in skipped)


@pytest.mark.slow
@pytest.mark.timeout(250)
def test_one_rank() -> None:
    """In bf16 and fp16, with recomputation, and over two local devices.

    Without recomputation, the backward of all chunks of torchgpipe is one. Their gradients are added to `.grad` one
    after another, but by plain autocast after their sum. The first micro-batch of a step is the same in both forms.
    """
    options: list[dict[str, Any]] = [
        {"recompute": 99},
        {"recompute": 99, "devices": 2},
        {"devices": 2, "microbatch": 4, "steps": 1},
    ]
    plain = [case(name, [1, 1, 1], autocast) for name, autocast in product(MODELS, DTYPES)]
    compare(1, plain + [case(name, [1, 1, 1], "bfloat16", **o) for name, o in product(MODELS, options)])


@pytest.mark.slow
@pytest.mark.timeout(250)
def test_schedules() -> None:
    options: list[dict[str, Any]] = [{"schedule": s} for s in ("interleaved", "zb-2p", "zb-v")]
    options.append({"schedule": "zb-h1", "recompute": 1})
    compare(2, [case(name, [2, 1, 1], "bfloat16", **option) for name, option in product(MODELS, options)])


@pytest.mark.slow
@pytest.mark.timeout(250)
def test_expert_shards() -> None:
    compare(2, [case(name, sharded(name, 1, 2), autocast) for name, autocast in product(MODELS, DTYPES)])
