"""One step of every schedule against one rank."""

import math
import re

import pytest
import torch

from fira.doctor import schedule_check
from fira.doctor.limited_process import Outcome
from fira.doctor.one_step import StepNumbers
from fira.doctor.schedule_check import check_schedules, describe, largest_difference, layouts
from pipeline.mesh import Layout
from pipeline.mpi import init
from pipeline.schedule import SCHEDULES
from tests.launch import run_function


def checked(scale: float = 1.0) -> list[object]:
    """Run the comparison. scale: factor of the gradient norm that the reference reports."""
    world, lines = init(), []
    if scale != 1:
        plain = schedule_check.reference

        def wrong(*arguments):
            numbers = plain(*arguments)
            return StepNumbers(numbers.loss, numbers.grad_norm * scale, numbers.seconds)

        schedule_check.reference = wrong
    agree = check_schedules(world, torch.device("cpu"), lines.append)
    return [agree, lines]


def test_two_ranks_agree_with_one():
    by_rank = run_function(2, __name__, "checked", timeout=120)
    assert [agree for agree, _ in by_rank] == [True, True]
    title, *rows = by_rank[0][1]
    assert re.fullmatch(
        r"one training step of fira-tiny on 2 ranks, .*: loss \d\.\d{6}, gradient norm \d\.\d{6}", title
    )
    assert [row.split()[0] for row in rows] == [*SCHEDULES, "1f1b"]
    assert all(" OK " in row for row in rows)
    assert all("identical" in row for row in rows if "pp 2" in row)  # a pipeline adds in the order of one rank


def test_a_wrong_gradient_norm_is_found():
    for agree, (_, *rows) in run_function(2, __name__, "checked", timeout=120, scale=1.001):
        assert agree is False
        assert all(" DIFFERS " in row for row in rows)


def test_a_reference_that_fails_is_reported(monkeypatch):
    monkeypatch.setattr(schedule_check, "run_limited", lambda *_: Outcome(1, "Traceback\nMemoryError\n", 1.0, 0))
    monkeypatch.setattr(schedule_check.dist, "broadcast_object_list", lambda values, src: None)
    lines: list[str] = []
    world = type("World", (), {"rank": 0, "size": 2})()
    assert not check_schedules(world, torch.device("cpu"), lines.append)
    assert lines == ["one training step of fira-tiny on one rank failed: MemoryError"]


@pytest.mark.parametrize("ranks", [2, 3, 4, 6, 8, 64])
def test_every_layout_has_as_many_stages_as_the_layers_allow(ranks):
    found = layouts(ranks)
    assert [schedule for _, schedule in found] == [*SCHEDULES, "1f1b"]
    assert all(layout.world == ranks for layout, _ in found)
    stages = {schedule: layout.pp for layout, schedule in found[:-1]}
    assert stages["gpipe"] == max(n for n in range(1, 7) if ranks % n == 0)
    assert stages["zb-v"] == max(n for n in range(1, 4) if ranks % n == 0)
    assert found[-1][0].pp == 1


def test_difference_is_relative_and_infinite_for_nan():
    expected = StepNumbers(2.0, 4.0, 1.0)
    assert largest_difference(expected, expected) == 0
    assert largest_difference(StepNumbers(2.0, 4.4, 1.0), expected) == pytest.approx(0.1)
    assert largest_difference(StepNumbers(math.nan, 4.0, 1.0), expected) == math.inf


def test_a_row_says_whether_the_step_differs():
    numbers = StepNumbers(2.0, 4.0, 0.25)
    assert describe(Layout(2, 1, 1), "zb-v", numbers, 0.0).split()[-4:] == ["OK", "identical", "0.25", "s"]
    assert describe(Layout(2, 1, 1), "zb-v", numbers, 2e-3).split()[-4:] == ["DIFFERS", "2e-03", "0.25", "s"]
