"""Runs with a loss spike or a loss that is not finite, against runs from the checkpoint without the sequences."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.fira.training.small_runs import PP2_DP2_EP2, cache
from tests.launch import run_function
from tests.ranks.fault_ranks import BATCH

STEPS = list(range(1, 13))
FLAGS = ["--steps", "12", "--save-every", "3", "--keep", "9", "--eval-every", "100", "--warmup", "2", "--quiet"]


def run(ranks: int, function: str, settings: Path, out: Path, *layout: object) -> list[dict[str, Any]]:
    flags = ["--config", str(settings), *FLAGS, *map(str, layout)]
    return run_function(ranks, "tests.ranks.fault_ranks", function, 170, cache(settings), flags=flags, out=str(out))


@pytest.fixture(scope="module")
def results(settings: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(1, "run_all", settings, tmp_path_factory.mktemp("faults"))[0]


@pytest.mark.slow
def test_run_continues_from_the_last_checkpoint_without_the_sequences_since(results: dict[str, Any]) -> None:
    """The checkpoint of step 6 is used for a spike in step 8; a loss in step 7 that is not finite may be its fault."""
    skipped = {
        "spike": {"step": 8, "restored": 6, "first": 6 * BATCH, "end": 8 * BATCH},
        "nan": {"step": 7, "restored": 3, "first": 3 * BATCH, "end": 7 * BATCH},
    }
    for kind, rollback in skipped.items():
        assert results[kind]["steps"] == STEPS
        assert results[kind]["rollbacks"] == [rollback]
        assert results[kind]["hashes"] == results[f"{kind} reference"]["hashes"]
        after = rollback["restored"]
        assert results[kind]["losses"][after:] == results[f"{kind} reference"]["losses"]
        assert results[kind]["hashes"] != results["spike ignored"]["hashes"]
        assert results[kind]["folders"] == ["latest", *(f"step-{step:06d}" for step in (3, 6, 9, 12))]


@pytest.mark.slow
def test_run_resumed_before_the_fault_repeats_the_rollback(results: dict[str, Any]) -> None:
    for name in ("hashes", "rollbacks"):
        assert results["spike resumed"][name] == results["spike"][name]


@pytest.mark.slow
def test_without_the_flag_spikes_are_ignored_and_a_loss_that_is_not_finite_ends_the_run(
    results: dict[str, Any],
) -> None:
    assert results["spike ignored"]["steps"] == STEPS
    assert results["spike ignored"]["rollbacks"] == []
    assert results["stopped"].startswith("the loss is nan; this step changed no weight; resume from an earlier ")
    assert results["stopped folders"] == ["step-000003"]  # that of step 6 may be the cause


@pytest.mark.slow
def test_rollbacks_are_limited_and_need_a_checkpoint(results: dict[str, Any]) -> None:
    assert results["limit"].endswith("; 3 rollbacks to the checkpoint of step 3 did not help")
    assert results["no checkpoint"].startswith("the loss is nan; this step changed no weight")


@pytest.mark.slow
def test_all_layouts_roll_back_alike(results: dict[str, Any], settings: Path, tmp_path: Path) -> None:
    for rank in run(4, "roll_back", settings, tmp_path, *PP2_DP2_EP2):
        for kind in ("spike", "nan"):
            assert rank[kind]["rollbacks"] == results[kind]["rollbacks"]
            np.testing.assert_allclose(rank[kind]["losses"], results[kind]["losses"], rtol=1e-6)
