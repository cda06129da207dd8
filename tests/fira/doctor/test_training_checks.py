"""Comparison of the logs of two runs, and a check that must fail."""

import sys
from pathlib import Path

import pytest

from fira.doctor.gpu_check import Target, run_program
from fira.doctor.training_checks import compare, two_ranks
from tests.launch import ROOT


def log(*losses: float) -> list[dict[str, str]]:
    return [{"train_loss": str(loss)} for loss in losses]


def test_equal_and_nearly_equal_runs():
    assert compare(log(6.0, 5.0), log(6.0, 5.0)) == "loss 6.0000 → 5.0000, identical"
    assert compare(log(6.0, 5.0), log(6.0, 5.05)) == "loss 6.0000 → 5.0000, largest difference 1e-02"
    assert "largest difference" in compare(log(6.03, 5.0), log(6.0, 5.0), "bf16")


@pytest.mark.parametrize(
    ("losses", "expected", "message"),
    [
        (log(6.03, 5.0), log(6.0, 5.0), "the first step differs by 5.0e-03"),
        (log(6.0, 5.5), log(6.0, 5.0), "a step differs by 1.0e-01"),
        (log(6.0, 6.1), log(6.0, 6.1), "the loss has not fallen"),
        (log(6.0), log(6.0, 5.0), "1 steps instead of 2"),
        (log(6.0, float("nan")), log(6.0, 5.0), "a step differs by nan"),
    ],
)
def test_runs_that_differ(losses, expected, message):
    with pytest.raises(AssertionError, match=message):
        compare(losses, expected)


def test_a_program_with_another_exit_status_fails(capsys):
    command = [sys.executable, "-c", "print('the reason'); raise SystemExit(3)"]
    assert run_program(command, 3) == "the reason\n"
    with pytest.raises(AssertionError, match="ended with status 3 instead of 0"):
        run_program(command)
    assert "the reason" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_that_trains_differently_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    target = Target("cpu", str(tmp_path), (sys.executable, str(ROOT / "tests" / "ranks" / "train.py")), steps=8)
    assert "loss" in two_ranks(target, "--pp", "2")
    with pytest.raises(AssertionError, match="differs by"):
        two_ranks(target, "--pp", "2", "--seed", "7")
