"""A rank that becomes slow is named once; a stage with more work, single slow steps and a slow machine are not."""

import logging

import pytest

from fira.training.stragglers import WINDOW, Stragglers
from pipeline.mesh import Layout
from pipeline.mpi import World


def reports(layout: Layout, windows: list[list[float]], caplog: pytest.LogCaptureFixture) -> list[str]:
    """The messages for windows of steps in which every rank has a constant own time in seconds."""
    stragglers = Stragglers(World(0, layout.world, 0, layout.world), layout)
    with caplog.at_level(logging.WARNING, "fira"):
        stragglers.update(0, [0.0] * 3 * layout.world)
        for number, own in enumerate(windows):
            for step in range(WINDOW):
                spike = 10 if step % 3 == 0 else 1  # in a minority of the steps
                times = [x for s in own for x in (s * spike, max(own) - s, s / 2)]
                stragglers.update(number * WINDOW + step + 1, times)
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize(
    ("layout", "windows"),
    [
        (Layout(pp=2), [[0.1, 0.3], [0.1, 0.3]]),  # stages with different work
        (Layout(pp=2), [[0.1, 0.3], [0.2, 0.6]]),  # the whole machine is slower
        (Layout(pp=2, dp=2), [[0.1, 0.1, 0.3, 0.3]]),
        (Layout(dp=2), [[0.001, 0.005]]),  # less than LEAST_S
        (Layout(dp=2), [[0.1, 0.14]]),  # less than FACTOR
        (Layout(), [[0.1], [0.9]]),  # one rank
        (Layout(pp=2), [[0.1, 0.3], [0.2, 0.3]]),  # no rank waits for rank 0
        (Layout(dp=2), [[0.1, 0.2], [0.1, 0.1]]),  # slow in one window only
    ],
)
def test_equal_ranks_are_not_reported(layout, windows, caplog):
    assert not reports(layout, [*windows, windows[-1]], caplog)


@pytest.mark.parametrize(
    ("layout", "windows", "rank", "text"),
    [
        (
            Layout(dp=2),
            [[0.1, 0.2]],
            1,
            "rank 1 (stage 0) is slow: in steps 21 to 40 its own work took 200 ms per step",
        ),
        (
            Layout(pp=2),
            [[0.1, 0.3], [0.9, 0.3]],
            0,
            "rank 0 (stage 0) is slow: in steps 41 to 60 its own work took 900 ms",
        ),
        (
            Layout(pp=2, dp=2),
            [[0.1, 0.1, 0.3, 0.6]],
            3,
            "rank 3 (stage 1) is slow: in steps 21 to 40 its own work took 600 ms",
        ),
    ],
)
def test_slow_rank_is_reported_once_with_the_expected_time(layout, windows, rank, text, caplog):
    messages = reports(layout, [*windows, windows[-1], windows[-1]], caplog)
    assert len(messages) == 1
    assert messages[0].startswith(text)
    expected = {0: 100, 1: 100, 3: 300}[rank]
    assert f", {expected} ms were expected, and its thread ran for" in messages[0]


def test_rank_is_reported_again_after_a_normal_window(caplog):
    normal, slow = [0.1, 0.1], [0.1, 0.2]
    assert len(reports(Layout(dp=2), [slow, slow, normal, slow, slow, slow], caplog)) == 2


def test_sum_of_the_exchanged_lists_has_the_times_of_all_ranks():
    ranks = [Stragglers(World(rank, 3, rank, 3), Layout(dp=3)) for rank in range(3)]
    for rank in ranks:
        rank.start()
        rank.stop()
    lists = [rank.exchanged() for rank in ranks]
    assert all(len(times) == 9 for times in lists)
    assert [[position for position, x in enumerate(times) if x] for times in lists]  # placed by rank
    for rank, times in enumerate(lists):
        assert times[3 * rank] > 0
        assert not any(times[: 3 * rank] + times[3 * rank + 3 :])
