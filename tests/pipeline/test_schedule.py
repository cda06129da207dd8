"""Schedules, their simulation and the partition, against formulas and brute force."""

from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.partition import partition
from pipeline.schedule import (
    SCHEDULES,
    Action,
    Kind,
    Schedule,
    forward_only,
    gpipe,
    interleaved,
    one_forward_one_backward,
    zero_bubble_h1,
)
from pipeline.simulate import ScheduleError, Timeline, draw, simulate

F, B = Kind.FORWARD, Kind.BACKWARD
SIZES = [(1, 1), (1, 4), (2, 1), (2, 2), (3, 5), (4, 3), (4, 8), (8, 20)]


def units(schedule: Schedule, scale: float = 1.0) -> dict[Kind, list[float]]:
    """F, I and W of one unit, a whole backward of two."""
    return {kind: [scale * (2.0 if kind is B else 1.0)] * schedule.stages for kind in Kind}


def run(schedule: Schedule) -> Timeline:
    """Stages that share a rank are smaller, so that every schedule has the same work."""
    return simulate(schedule, units(schedule, len(schedule.actions) / schedule.stages))


@pytest.mark.parametrize("name", SCHEDULES)
@settings(deadline=None, max_examples=30)
@given(ranks=st.integers(1, 9), microbatches=st.integers(1, 30))
def test_every_size_can_be_run(name, ranks, microbatches):
    spec = SCHEDULES[name]
    schedule = spec.builder(ranks, microbatches)
    assert schedule.name == name
    assert schedule.placement == spec.placement(ranks)
    assert schedule.stages == ranks * spec.stages_per_rank
    kinds = {action.kind for actions in schedule.actions for action in actions}
    assert kinds == ({F, Kind.INPUT, Kind.WEIGHT} if spec.splits_backward else {F, B})
    assert run(schedule).length >= 3 * microbatches
    assert simulate(forward_only(schedule.placement, microbatches), units(schedule)).length > 0


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("stages", "microbatches"), SIZES)
def test_bubble_is_the_one_of_the_papers(name, stages, microbatches):
    """(p − 1) / (m + p − 1) for stages of equal cost, and a backward twice a forward (Narayanan et al. 2021, §2.2)."""
    timeline = run(SCHEDULES[name].builder(stages, microbatches))
    assert timeline.bubble == pytest.approx((stages - 1) / (microbatches + stages - 1))
    assert timeline.length == pytest.approx(3 * (microbatches + stages - 1))


@pytest.mark.parametrize("chunks", [2, 3])
@pytest.mark.parametrize(("ranks", "microbatches"), [(1, 4), (2, 2), (2, 4), (3, 9), (4, 8), (8, 16)])
def test_interleaving_divides_the_bubble(ranks, microbatches, chunks):
    """(p − 1) / v forwards and backwards (Narayanan et al. 2021, §2.2); whole groups of micro-batches."""
    assert run(interleaved(ranks, microbatches, chunks)).length == pytest.approx(
        3 * (microbatches + (ranks - 1) / chunks)
    )


@pytest.mark.parametrize(("ranks", "microbatches"), [(1, 4), (2, 4), (3, 6), (4, 8), (4, 16), (8, 16), (8, 32)])
def test_zero_bubbles(ranks, microbatches):
    """Qi et al. 2023, table 2 with F = I = W: p − 1 for ZB-H1, none between a rank's first and last action for ZB-2p;
    1F1B's memory for ZB-H1 and ZB-V, at most twice that for ZB-2p."""
    h1, twice, v = (run(SCHEDULES[name].builder(ranks, microbatches)) for name in ("zb-h1", "zb-2p", "zb-v"))
    assert h1.length == twice.length == pytest.approx(3 * microbatches + ranks - 1)
    for spans in twice.spans:
        assert spans[-1][2] - spans[0][1] == pytest.approx(3 * microbatches)
    # Rank 0 of ZB-V could wait for the last rank's first forward only; the greedy lists come within a unit of that.
    assert v.length <= 3 * microbatches + (ranks - 1) / 2 + 1
    assert max(h1.peak_activations) <= ranks
    assert max(twice.peak_activations) <= 2 * ranks - 1
    assert max(v.peak_activations) <= 2 * ranks  # of stages half the size


@pytest.mark.parametrize(("stages", "microbatches"), SIZES)
def test_what_must_be_kept(stages, microbatches):
    assert run(gpipe(stages, microbatches)).peak_activations == (microbatches,) * stages
    kept = run(one_forward_one_backward(stages, microbatches)).peak_activations
    assert kept == tuple(min(microbatches, stages - s) for s in range(stages))


def test_forward_only_has_no_backward():
    schedule = forward_only((0, 1, 2), 4)
    assert run(schedule).length == 6
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
        (lists("F0 F1 I0 I1", "F0 I0 F1 I1"), "missing, foreign or doubled: W0.0"),
        (lists("F0 F1 W0 I0 I1 W1", "F0 I0 W0 F1 I1 W1"), "»W0.0«"),
    ],
)
def test_a_bad_schedule_is_refused_and_the_cell_marked(schedule, words):
    with pytest.raises(ScheduleError, match=words):
        run(schedule)


def test_an_action_on_the_wrong_rank_is_refused():
    good = gpipe(2, 1)
    swapped = Schedule("swapped", 1, (1, 0), good.actions)
    with pytest.raises(ScheduleError, match="wrong rank"):
        run(swapped)


def test_the_picture():
    assert draw(run(gpipe(2, 2)), width=9) == "01···aabb\n·01aabb··"
    assert draw(run(zero_bubble_h1(2, 2)), width=7) == "01·aAbB\n·0a1bAB"


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
