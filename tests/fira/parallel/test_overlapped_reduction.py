"""Gradients that are reduced during the backward equal those that are reduced after it, in every schedule."""

import functools
from typing import Any

import pytest

from fira.parallel.parallelize import EVERY_BLOCK
from pipeline.schedule import SCHEDULES
from tests.launch import run_function

FAST: list[dict[str, Any]] = [{"layout": [1, 2, 1]}, {"layout": [1, 2, 2], "schedule": "zb-h1", "autocast": "bfloat16"}]
SLOW = [
    {"layout": [1, 2, 2], "schedule": "zb-v", "recompute": 2},
    {"layout": [1, 2, 2], "schedule": "zb-h1", "backend": "gloo"},
    {"layout": [1, 2, 1], "schedule": "zb-v", "model": "tied"},
    {"layout": [1, 2, 2], "devices": 2},
    *({"layout": [1, 2, 2], "schedule": schedule} for schedule in SCHEDULES),
    *({"layout": [2, 2, 2], "schedule": schedule} for schedule in SCHEDULES),
    *({"layout": [2, 2, 1], "schedule": schedule, "model": "tied"} for schedule in ("1f1b", "zb-h1", "zb-v")),
    *({"layout": [1, 2, 1], "schedule": schedule, "model": "shared weights"} for schedule in ("1f1b", "zb-v")),
    *({"layout": [1, 2, ep], "model": "many experts"} for ep in (1, 2)),
    *({"layout": [1, 4, ep], "dtype": dtype} for ep in (1, 2) for dtype in ("float32", "float64")),
    {"layout": [1, 2, 2], "recompute": EVERY_BLOCK},
    {"layout": [1, 2, 1], "recompute": EVERY_BLOCK, "devices": 2},
    {"layout": [1, 2, 2], "dtype": "float64", "fp16": True},
    {"layout": [2, 2, 2], "schedule": "zb-h1", "recompute": 1},
    {"layout": [2, 2, 2], "backend": "gloo"},
    {"layout": [1, 2, 1], "autocast": "bfloat16", "recompute": EVERY_BLOCK},
    *({"layout": [1, 4, 2], "dtype": dtype, "backend": "gloo"} for dtype in ("float32", "float64")),
]

pytestmark = pytest.mark.timeout(240)  # the first test of a number of ranks waits for all their cases


def ranks_of(case: dict[str, Any]) -> int:
    return case["layout"][0] * case["layout"][1]


@functools.cache
def results(ranks: int, slow: bool) -> list[Any]:
    """[rank][case]"""
    return run_function(ranks, "tests.ranks.reduction_ranks", "compare_all", timeout=220, cases=cases_of(ranks, slow))


def cases_of(ranks: int, slow: bool) -> list[dict[str, Any]]:
    return [case for case in (SLOW if slow else FAST) if ranks_of(case) == ranks]


@pytest.mark.parametrize(
    ("case", "slow"),
    [*((case, False) for case in FAST), *(pytest.param(case, True, marks=pytest.mark.slow) for case in SLOW)],
    ids=str,
)
def test_gradients_equal_those_of_reduce_gradients(case, slow):
    """Bitwise with two replicas, because a sum of two does not depend on the order."""
    place = cases_of(ranks_of(case), slow).index(case)
    tolerance = {"float32": 1e-6, "float64": 1e-12}[case["dtype"]] if case["layout"][1] == 4 else 0.0
    for of_rank in results(ranks_of(case), slow):
        result = of_rank[place]
        assert result["compared"] > 20
        assert result["difference"] <= tolerance
        if tolerance == 0.0:
            assert result["during"] == result["after"]
        for ours, expected in zip(result["during"], result["after"], strict=True):
            assert ours == pytest.approx(expected, rel=1e-6)
        check_order(case, result)


def check_order(case: dict[str, Any], result: dict[str, Any]) -> None:
    """Layers start in descending order, and all except the lowest of a stage before its last backward ends.

    Two kinds of layers start after it: those of torchgpipe, and where the backward is split, recomputed layers, which
    are not. With integer inputs, the backward of stage 0 is not split.
    """
    log, stages = result["log"], result["stages"]
    splits_backward = SCHEDULES[case.get("schedule", "1f1b")].splits_backward
    finish = log.index("finish")
    for stage, layers in stages.items():
        early = layers[1:]
        if "devices" in case:
            early = []
        elif splits_backward and stage != "0":
            early = layers[case.get("recompute", 0) + 1 :]
        starts = [layer for layer in reversed(layers) if layer or case.get("model") != "tied"]  # the table is later
        end = log.index(f"end of stage {stage}")
        assert [layer for layer in log[:end] if layer in layers] == early[::-1]
        assert [layer for layer in log[end:finish] if layer in layers] == starts[len(early) :]
    assert log[finish + 1 :] == ([0] if result["tied"] and "0" in stages else [])


def test_gradient_after_the_start_of_its_reduction_is_an_error():
    for error in run_function(1, "tests.ranks.reduction_ranks", "late_gradient"):
        assert "layer 4 arrived after the reduction of the layer had started" in error
