"""Schedules, their simulation and the partition, against formulas and brute force."""

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.partition import partition
from pipeline.schedule import SCHEDULES, Action, Kind, Schedule, forward_only, gpipe, one_forward_one_backward
from pipeline.simulate import ScheduleError, draw, simulate

F, B = Kind.FORWARD, Kind.BACKWARD
SIZES = [(1, 1), (1, 4), (2, 1), (2, 2), (3, 5), (4, 3), (4, 8), (8, 20)]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("stages", "microbatches"), SIZES)
def test_bubble_is_the_one_of_the_papers(name, stages, microbatches):
    """(p − 1) / (m + p − 1) for stages of equal cost, and a backward twice a forward (Narayanan et al. 2021, §2.2)."""
    timeline = simulate(SCHEDULES[name](stages, microbatches), [1.0] * stages, [2.0] * stages)
    assert timeline.bubble == pytest.approx((stages - 1) / (microbatches + stages - 1))
    assert timeline.length == pytest.approx(3 * (microbatches + stages - 1))


@pytest.mark.parametrize(("stages", "microbatches"), SIZES)
def test_what_must_be_kept(stages, microbatches):
    cost = [1.0] * stages
    assert simulate(gpipe(stages, microbatches), cost, cost).peak_activations == (microbatches,) * stages
    kept = simulate(one_forward_one_backward(stages, microbatches), cost, cost).peak_activations
    assert kept == tuple(min(microbatches, stages - s) for s in range(stages))


def test_forward_only_has_no_backward():
    schedule = forward_only(3, 4)
    assert simulate(schedule, [1.0] * 3, []).length == 6
    assert {action.kind for actions in schedule.actions for action in actions} == {F}


def lists(*ranks: str) -> Schedule:
    """A schedule of two stages from words such as "F0 B0"."""
    actions = tuple(tuple(Action(Kind(w[0]), s, int(w[1])) for w in words.split()) for s, words in enumerate(ranks))
    return Schedule("hand-made", 2, (0, 1), actions)


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        (lists("F0 F1 B0", "F0 B0 F1 B1"), "missing, foreign or doubled: B0.1"),
        (lists("F0 F1 B0 B1 B1", "F0 B0 F1 B1"), "doubled: B0.1"),
        (lists("F0 F1 B1 B0", "F0 B0 F1 B1"), "»B0.0«"),
        (lists("F0 B0 F1 B1", "F0 F1 B0 B1"), "»B0.0«"),
        (lists("B0 F0 F1 B1", "F0 B0 F1 B1"), "»B0.0«"),
    ],
)
def test_a_bad_schedule_is_refused_and_the_cell_marked(schedule, words):
    with pytest.raises(ScheduleError, match=words):
        simulate(schedule, [1.0, 1.0], [1.0, 1.0])


def test_an_action_on_the_wrong_rank_is_refused():
    good = gpipe(2, 1)
    swapped = Schedule("swapped", 1, (1, 0), good.actions)
    with pytest.raises(ScheduleError, match="wrong rank"):
        simulate(swapped, [1.0, 1.0], [1.0, 1.0])


def test_the_picture():
    assert draw(simulate(gpipe(2, 2), [1.0, 1.0], [1.0, 1.0]), width=6) == "01··ab\n·01ab·"


def worst(costs: list[float], cuts: tuple[int, ...]) -> float:
    edges = [0, *cuts, len(costs)]
    return max(sum(costs[a:b]) for a, b in pairwise(edges))


@given(st.lists(st.integers(0, 20), min_size=1, max_size=9), st.data())
def test_partition_is_as_good_as_brute_force(costs, data):
    stages = data.draw(st.integers(1, len(costs)))
    parts = partition(costs, stages)
    assert [i for part in parts for i in part] == list(range(len(costs)))
    assert len(parts) == stages
    assert all(parts)
    best = min(worst(costs, cuts) for cuts in combinations(range(1, len(costs)), stages - 1))
    assert max(sum(costs[i] for i in part) for part in parts) == best


def test_spare_room_is_spread_evenly():
    assert partition([5, 1, 1, 1, 1], 3) == [range(1), range(1, 3), range(3, 5)]


def test_more_stages_than_layers():
    with pytest.raises(ValueError, match="2 layers cannot be cut into 3 stages"):
        partition([1.0, 1.0], 3)
