"""The list of GPU checks, their time limits and the report, run on the CPU."""

import re
import sys
import time
from pathlib import Path

import pytest

from fira.doctor import gpu_report, limited_process
from fira.doctor.finding import Finding, Level
from fira.doctor.gpu_check import GpuCheck, Target
from fira.doctor.gpu_report import CHECKS, examine_gpus, run_check, run_checks
from fira.doctor.limited_process import Outcome
from fira.doctor.operation_checks import NAMES, check_operation
from fira.errors import UserError
from pipeline.schedule import SCHEDULES
from tests.fira.doctor.example_checks import crashing, ended, good, hanging, leaving, wrong
from tests.launch import ROOT

TRAIN = (sys.executable, str(ROOT / "tests" / "ranks" / "train.py"))


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Target:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(limited_process, "EXIT_S", 0.5)
    return Target("cpu", str(tmp_path), TRAIN, steps=8)


def test_a_check_that_hangs_fails_or_crashes_does_not_end_the_others(target, tmp_path):
    checks = [
        GpuCheck("hanging", hanging, 4),
        GpuCheck("wrong", wrong, 60),
        GpuCheck("crashing", crashing, 60),
        GpuCheck("ended", ended, 60),
        GpuCheck("leaving", leaving, 60),
        GpuCheck("good", good, 60, arguments=("perfect",)),
    ]
    lines: list[str] = []
    findings = [Finding("cuda:0", "Tesla T4", Level.PROBLEM, "none")]
    started = time.monotonic()
    results = run_checks(checks, target, findings, tmp_path / "report.md", lines.append)
    assert time.monotonic() - started < 60
    assert [(result.verdict, result.detail) for result in results] == [
        ("timed out", "stopped after 4 s"),
        ("failed", "AssertionError: the sum is 3 instead of 4"),
        ("failed", results[2].detail),
        ("failed", "ended with status 0"),
        ("failed", "left 1 processes behind"),
        ("OK", "perfect on cpu"),
    ]
    assert lines[0].startswith("6 checks, ")
    assert lines[1] == "[1/6] hanging …"
    assert lines[-2:] == [f"\n1 of 6 checks are OK; report: {tmp_path / 'report.md'}", "attach the report to an issue"]

    report = (tmp_path / "report.md").read_text()
    assert "| cuda:0 | PROBLEM | Tesla T4 |" in report
    assert re.search(r"\| good \| OK \| [\d.]+ of 60 \| perfect on cpu \|", report)
    assert "### hanging: timed out\n\n```text\nwaiting for a message\n```" in report
    assert "AssertionError: the sum is 3 instead of 4\n```" in report
    assert "### good: OK\n\n```text\nperfect on cpu\nwith | details\n```" in report


def test_report_is_written_after_every_check(target, tmp_path):
    seen: list[str] = []

    def watch(line: str) -> None:
        if line.startswith("[2/2]"):
            seen.append((tmp_path / "report.md").read_text())

    run_checks([GpuCheck("a", good, 60), GpuCheck("b", good, 60)], target, [], tmp_path / "report.md", watch)
    assert "1 of 1 checks are OK; 1 of 2 were not run." in seen[0]


def test_a_machine_without_gpu_is_told_so_in_one_line(monkeypatch):
    monkeypatch.setattr(gpu_report, "find_devices", lambda: (None, Outcome(1, "", 1.0, 0)))
    with pytest.raises(UserError, match=r"^--gpu: torch \S+ sees no GPU; ") as error:
        examine_gpus(TRAIN, print)
    assert "\n" not in str(error.value)


def test_checks_for_two_gpus_cover_every_schedule():
    names = [check.name for check in CHECKS]
    assert len(names) == len(set(names))
    two = [" ".join(check.arguments) for check in CHECKS if check.gpus == 2]
    assert [words for words in two if "--schedule" in words] == [f"--pp 2 --schedule {name}" for name in SCHEDULES]
    assert "--dp 2 --ep 2" in two
    assert {check.arguments[0] for check in CHECKS if check.run is check_operation} == set(NAMES)


@pytest.mark.parametrize("check", CHECKS[:2], ids=lambda check: check.name)
def test_check_on_the_cpu(target, check):
    result = run_check(check, target)
    assert result.verdict == "OK", result.text


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_one_check_of_each_kind_on_the_cpu(target, tmp_path):
    """Two CPU devices stand for two GPUs."""
    by_function = {check.run: check for check in reversed(CHECKS)}
    results = run_checks([*by_function.values()], target, [], tmp_path / "report.md", print)
    assert [(result.check.name, result.text) for result in results if result.verdict != "OK"] == []
