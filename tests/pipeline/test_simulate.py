"""The simulator compared with timelines computed by hand and an independent longest-path search."""

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.schedule import (
    SCHEDULES,
    Action,
    ActionKind,
    Schedule,
    dependencies,
    forward_only,
    gpipe,
    zero_bubble_h1,
)
from pipeline.simulate import (
    ScheduleError,
    Timeline,
    earliest_ends,
    format_grid,
    peak_memory,
    simulate,
)

F, B, I, W = ActionKind  # noqa: E741


def unit_costs(stages: int) -> dict[ActionKind, list[float]]:
    return {kind: [2.0 if kind is B else 1.0] * stages for kind in ActionKind}


@pytest.mark.parametrize("name", SCHEDULES)
@settings(max_examples=20, deadline=None)
@given(ranks=st.integers(1, 4), microbatches=st.integers(1, 6), seed=st.randoms(), transfer=st.integers(0, 3))
def test_start_times_are_the_longest_paths(name, ranks, microbatches, seed, transfer):
    """An action starts when the action before it on its rank and its dependencies, after their transfer, have ended."""
    schedule = SCHEDULES[name].builder(ranks, microbatches)
    costs = {kind: [seed.randint(1, 9) for _ in range(schedule.stages)] for kind in ActionKind}
    previous = {b: a for actions in schedule.actions for a, b in zip((None, *actions), actions, strict=False)}

    @cache
    def start(action: Action) -> int:
        rank = schedule.placement[action.stage]
        bounds = [0] if previous[action] is None else [end(previous[action])]
        for needed in dependencies(action, schedule.stages):
            bounds.append(end(needed) + transfer * (schedule.placement[needed.stage] != rank))
        return max(bounds)

    def end(action: Action) -> int:
        return start(action) + costs[action.kind][action.stage]

    timeline = simulate(schedule, costs, transfer)
    assert timeline.spans == tuple(tuple((a, start(a), end(a)) for a in actions) for actions in schedule.actions)


def test_transfer_by_hand():
    """F0 ends at 1 and arrives at 1.5; F1 and B1 take 3; the gradient arrives at 5; B0 takes 2."""
    timeline = simulate(gpipe(2, 1), unit_costs(2), transfer=0.5)
    assert timeline.spans[1] == ((Action(F, 1, 0), 1.5, 2.5), (Action(B, 1, 0), 2.5, 4.5))
    assert timeline.length == 7
    assert timeline.bubble == pytest.approx(1 - 6 / 14)


def test_empty_timeline():
    assert Timeline(()).length == Timeline(()).bubble == 0


def test_no_transfer_between_stages_of_one_rank():
    schedule = SCHEDULES["interleaved"].builder(1, 3)
    assert simulate(schedule, unit_costs(2), transfer=9.0).length == 18


def test_peak_memory():
    assert peak_memory(gpipe(2, 3), [10, 1]) == (30, 3)
    assert peak_memory(zero_bubble_h1(2, 4), [10, 1]) == (20, 2)
    assert peak_memory(gpipe(2, 3), [10, 1], [5, 5]) == (30, 3)  # its backwards are not split
    assert peak_memory(zero_bubble_h1(2, 4), [10, 10], [5, 5]) == (25, 30)  # rank 1 delays W by one micro-batch
    assert peak_memory(forward_only((0, 1), 2), [10, 1]) == (20, 2)


@pytest.mark.parametrize("name", SCHEDULES)
@settings(max_examples=50, deadline=None)
@given(ranks=st.integers(1, 4), microbatches=st.integers(1, 9), seed=st.randoms(), transfer=st.integers(0, 3))
def test_no_rank_ends_before_its_earliest_end(name, ranks, microbatches, seed, transfer):
    schedule = SCHEDULES[name].builder(ranks, microbatches)
    costs = {kind: [seed.randint(1, 9) for _ in range(schedule.stages)] for kind in ActionKind}
    costs[B] = [i + w for i, w in zip(costs[I], costs[W], strict=True)]
    timeline = simulate(schedule, costs, transfer)
    if not SCHEDULES[name].splits_backward:
        costs |= {I: costs[B], W: [0] * schedule.stages}
    bounds = earliest_ends(schedule.placement, microbatches, costs, transfer)
    assert all(bound <= spans[-1][2] for bound, spans in zip(bounds, timeline.spans, strict=True))


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "interleaved", "zb-2p"])
@pytest.mark.parametrize(("ranks", "microbatches"), [(1, 3), (2, 4), (4, 8), (8, 16)])
def test_earliest_end_is_reached_with_equal_stages(name, ranks, microbatches):
    schedule = SCHEDULES[name].builder(ranks, microbatches)
    costs = unit_costs(schedule.stages)
    length = simulate(schedule, costs).length
    if name != "zb-2p":
        costs |= {I: costs[B], W: [0.0] * schedule.stages}
    assert max(earliest_ends(schedule.placement, microbatches, costs)) == pytest.approx(length)


def test_earliest_ends_by_hand():
    """Rank 1 has stages 1 and 2: it starts at 2 + 3 and computes 2 · (10 + 10 + 1 + 1) with W; rank 0 then waits for
    the transfer back (3) and its I (4), and ends after W (5)."""
    costs = {F: [2.0, 10.0, 10.0], I: [4.0, 1.0, 1.0], W: [5.0, 7.0, 7.0]}
    assert earliest_ends((0, 1, 1), 2, costs, 3.0) == [5 + 44 + 3 + 4 + 5, 5 + 44 + 28]


def hand_made(*ranks: str) -> Schedule:
    """Return a schedule of one stage per rank and two micro-batches, from texts such as "F0 B0"."""
    actions = tuple(
        tuple(Action(ActionKind(word[0]), s, int(word[1])) for word in words.split()) for s, words in enumerate(ranks)
    )
    return Schedule("hand-made", 2, tuple(range(len(ranks))), actions)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (hand_made("F0 F1 B0", "F0 B0 F1 B1"), "missing, unexpected or duplicated actions: B0.1$"),
        (hand_made("F0 F1 B0 B1 B1", "F0 B0 F1 B1"), "duplicated actions: B0.1$"),
        (hand_made("F0 F1 B0 B1 B2", "F0 B0 F1 B1"), "unexpected or duplicated actions: B0.2, B1.2|: B0.2$"),
        (hand_made("", ""), "actions: F0.0, F0.1, F1.0, F1.1$"),
        (
            hand_made("F0 F1 B1 B0", "F0 B0 F1 B1"),
            "wrong rank or order:\nrank 0: F0.0 F0.1 B0.1 »B0.0«\nrank 1: F1.0 B",
        ),
        (hand_made("F0 B0 F1 B1", "F0 F1 B0 B1"), "deadlock.*:\nrank 0: F0.0 »B0.0« F0.1 B0.1\nrank 1: F1.0 »F1.1«"),
        (hand_made("B0 F0 F1 B1", "F0 B0 F1 B1"), "deadlock.*\nrank 0: »B0.0«"),
        (hand_made("F0 F1 I0 I1", "F0 I0 F1 I1"), "missing, unexpected or duplicated actions: W0.0, W0.1, W1.0, W1.1$"),
        (hand_made("F0 F1 W0 W1", "F0 W0 F1 W1"), "missing, unexpected or duplicated actions: I0.0, I0.1, I1.0, I1.1$"),
        (hand_made("F0 F1 I0 B1 W0", "F0 I0 F1 B1 W0"), "actions: B0.1, B1.1, I0.1, I1.1, W0.1, W1.1$"),
        (hand_made("F0 F1 W0 I0 I1 W1", "F0 I0 W0 F1 I1 W1"), "deadlock.*\nrank 0: F0.0 F0.1 »W0.0«"),
    ],
)
def test_invalid_schedule_raises_with_marked_cell(schedule, message):
    with pytest.raises(ScheduleError, match=message):
        simulate(schedule, unit_costs(2))


def test_action_on_wrong_rank_raises():
    schedule = Schedule("swapped", 1, (1, 0), gpipe(2, 1).actions)
    with pytest.raises(ScheduleError, match=r"wrong rank or order:\nrank 0: »F0\.0« B0\.0\nrank 1: F1\.0 B1\.0"):
        simulate(schedule, unit_costs(2))


def test_error_lists_at_most_eight_actions():
    with pytest.raises(ScheduleError, match=r"(, .*){7}$") as error:
        simulate(Schedule("short", 5, (0, 1), ((Action(F, 0, 0), Action(B, 0, 0)), ())), unit_costs(2))
    assert str(error.value).count(",") == 1 + 7


def test_format_grid():
    assert format_grid(gpipe(2, 1), [1]) == "rank 0: F0.0 »B0.0«\nrank 1: F1.0 B1.0"
    assert format_grid(gpipe(1, 1), [2]) == "rank 0: F0.0 B0.0"
