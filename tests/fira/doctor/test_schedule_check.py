"""One step of every schedule against one rank."""

import math
import re
from dataclasses import replace

import pytest
import torch

from fira.doctor import schedule_check
from fira.doctor.limited_process import Outcome
from fira.doctor.one_step import StepNumbers
from fira.doctor.schedule_check import check_schedules, describe_comparison, largest_difference, layouts
from pipeline.mesh import Layout
from pipeline.mpi import init
from pipeline.schedule import SCHEDULES
from tests.launch import run_function


def checked() -> list[list[object]]:
    """The comparison with one rank, and with numbers of one rank whose gradient norm is wrong by a thousandth."""
    found = []
    plain = schedule_check.reference
    for scale in (1.0, 1.001):

        def reference(*arguments, scale=scale):
            numbers = plain(*arguments)
            return replace(numbers, grad_norm=numbers.grad_norm * scale)

        schedule_check.reference = reference
        lines: list[str] = []
        found.append([check_schedules(init(), torch.device("cpu"), lines.append), lines])
    return found


@pytest.mark.slow
def test_two_ranks_agree_with_one_and_differ_from_wrong_numbers():
    first, second = run_function(2, __name__, "checked", timeout=150)
    (agree, (title, *rows)), (agree_with_wrong, (_, *wrong)) = first
    assert (agree, agree_with_wrong) == (second[0][0], second[1][0]) == (True, False)
    assert re.fullmatch(
        r"one training step of fira-tiny on 2 ranks, .*: loss \d\.\d{6}, gradient norm \d\.\d{6}", title
    )
    assert [row.split()[0] for row in rows] == [*SCHEDULES, "1f1b"]
    assert all(" OK " in row for row in rows)
    assert all("identical" in row for row in rows if "pp 2" in row)  # a pipeline adds in the order of one rank
    assert all(" DIFFERS " in row for row in wrong)


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
    assert describe_comparison(Layout(2, 1, 1), "zb-v", numbers, 0.0).split()[-4:] == ["OK", "identical", "0.25", "s"]
    assert describe_comparison(Layout(2, 1, 1), "zb-v", numbers, 2e-3).split()[-4:] == ["DIFFERS", "2e-03", "0.25", "s"]
