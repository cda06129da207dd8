"""The results of a training step against a plain forward and backward; steps that are skipped or fail."""

import functools
from typing import Any

import numpy as np
import pytest

from tests.fira.training.small_runs import PP2_DP2_EP2, losses, train
from tests.launch import run_function

FIELDS = ["loss", "grad_norm", "aux_loss", "dropped", "validation"]
LISTS = ["expert_load", "expert_dropped", "router_entropy", "balance"]


@functools.cache
def results(ranks: int) -> list[dict[str, Any]]:
    return run_function(ranks, "tests.ranks.trainer_ranks", "check_all")


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("run", ["fp32", "fp16", "pipeline"])
def test_step_and_validation_equal_a_plain_forward(ranks: int, run: str) -> None:
    """The weights are float64 in both cases, so that a loss scale, a power of two, changes no result."""
    for result in results(ranks):
        step, plain = result[run], result["plain"]
        for name in FIELDS:
            assert step[name] == pytest.approx(plain[name], rel=1e-7), name
        for name in LISTS if run != "pipeline" else LISTS[:-1]:
            for ours, expected in zip(step[name], plain[name], strict=True):
                assert ours == pytest.approx(expected, rel=1e-6), name
        assert (step["consumed"], step["skipped"], step["updates"]) == (5, False, 2)
        assert step["reads"] == [[0, 2], [2, 2], [4, 1]]  # first sequence and number of each validation batch
        for name in ("loss", "grad_norm"):  # the gradients of the first step, which had the learning rate 0, are gone
            assert step["second"][name] == pytest.approx(step[name], rel=1e-12)
        assert result["fp16"]["weights"] == result["fp32"]["weights"]


@pytest.mark.parametrize(("ranks", "sums"), [(1, [1.5, 2.5]), (2, [3.0, 6.0])])
def test_extra_numbers_and_bubble_are_reduced_over_ranks(ranks: int, sums: list[float]) -> None:
    """Every rank waits 2 s of a step of 8 s."""
    for result in results(ranks):
        assert result["fp32"]["extra"] == sums
        assert result["fp32"]["second"]["extra"] == []
        assert result["bubble"] == 0.25


@pytest.mark.parametrize("ranks", [1, 2])
def test_fractions_of_experts_with_no_or_one_assignment(ranks: int) -> None:
    for result in results(ranks):
        step = result["fractions"]
        assert step["expert_load"] == [[0, 1 / 16, 3 / 16, 4 / 16, 8 / 16]] * 2
        assert step["expert_dropped"] == [[0, 1, 1 / 3, 0, 1 / 4]] * 2
        assert step["dropped"] == 4 / 16


def test_extra_numbers_are_copied_to_the_device_without_waiting() -> None:
    assert results(1)[0]["copies"] == [{"non_blocking": True}]


def test_tied_weights_are_equal_after_a_step_and_their_gradients_are_summed() -> None:
    (single,) = results(1)
    assert single["tied"]["norm"] == pytest.approx(single["tied"]["plain"], rel=1e-6)
    copies = [copy for result in (single, *results(2)) for copy in result["tied"]["copies"]]
    assert len(copies) == 4
    assert all(copy == copies[0] for copy in copies)
    assert all(result["tied"]["norm"] == single["tied"]["norm"] for result in results(2))


def test_overflow_skips_the_step_and_halves_the_scale() -> None:
    (result,) = results(1)
    skipped, *regular, failed = result["overflow"]
    assert (skipped["skipped"], skipped["changed"], skipped["scale"]) == (True, False, 2.0**399)
    assert [(r["skipped"], r["changed"], r["scale"]) for r in regular] == [(False, True, 1.0), (False, True, 2.0**-14)]
    assert all(r["loss"] == result["fp32"]["loss"] for r in (skipped, *regular))
    assert "at every loss scale" in failed["error"]


def test_error_names_the_first_gradient_that_is_not_finite() -> None:
    """The step changes no weight. With fp16 an infinite gradient is an overflow."""
    (result,) = results(1)
    one, many = result["errors"]
    start = "a gradient is not finite, first gradient not finite: layers.2.norm1.weight"
    assert one["error"].startswith(f"{start} (1 of {one['entries']}); this step changed no weight; ")
    assert many["error"].startswith("the loss is nan, first gradient not finite: layers.0.token.weight (")
    assert "; layers.2.moe.experts.w1[4] is not finite since an earlier step; resume from" in many["error"]
    assert "no weight" not in many["error"]
    assert "earlier step" not in one["error"]
    assert not one["changed"]
    assert not many["changed"]
    assert result["ignored"] == {"error": ""}


def test_divergence_ends_all_ranks_before_the_update(settings, tmp_path):
    run = tmp_path / "run"
    result = train(settings, 4, *PP2_DP2_EP2, "--out", run, "--lr", 1e30, "--clip", 0, "--save-every", 1, status=2)
    lines = [line for line in result.stderr.splitlines() if line]
    assert len(lines) == 1
    assert "this step changed no weight" in lines[0] or "is not finite since an earlier step" in lines[0]
    assert "not finite" in lines[0] or "loss is" in lines[0]


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "blocks"), [("bf16", "full"), ("fp16", "auto")])
def test_lower_precision_gives_similar_losses(settings, uninterrupted, tmp_path, precision, blocks):
    run = tmp_path / "run"
    train(settings, 2, "--pp", 2, "--out", run, "--precision", precision, "--recompute", blocks, "--schedule", "gpipe")
    assert (losses(run) != losses(uninterrupted)).any()
    np.testing.assert_allclose(losses(run)[:, 0], losses(uninterrupted)[:, 0], rtol=0.02)
