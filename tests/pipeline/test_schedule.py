"""Schedules compared with the diagrams of their docstrings and the formulas of their papers."""

from itertools import pairwise
from types import SimpleNamespace

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
    interleaved,
    round_robin,
    v_shape,
)
from pipeline.simulate import Timeline, peak_memory, simulate

F, B, I, W = ActionKind  # noqa: E741
SIZES = [(1, 1), (1, 4), (2, 1), (2, 2), (3, 5), (4, 3), (4, 8), (8, 20)]


def run(schedule: Schedule) -> Timeline:
    """Return durations: one unit for F, I and W, two for B, divided by the stages per rank, so that a rank works 3m."""
    unit = len(schedule.actions) / schedule.stages
    return simulate(schedule, {kind: [unit * (2.0 if kind is B else 1.0)] * schedule.stages for kind in ActionKind})


def peak_activations(schedule: Schedule) -> tuple[int, ...]:
    """Return for each rank the maximum number of kept activations, one per stage and micro-batch."""
    return peak_memory(schedule, [1] * schedule.stages)


def text(schedule: Schedule) -> list[str]:
    return [" ".join(map(str, actions)) for actions in schedule.actions]


@pytest.mark.parametrize("name", SCHEDULES)
@settings(deadline=None, max_examples=30)
@given(ranks=st.integers(1, 9), microbatches=st.integers(1, 30))
def test_every_size_is_valid_and_matches_its_spec(name, ranks, microbatches):
    spec = SCHEDULES[name]
    schedule = spec.builder(ranks, microbatches)
    assert (schedule.name, schedule.microbatches) == (name, microbatches)
    assert schedule.placement == spec.placement(ranks)
    assert schedule.stages == ranks * spec.stages_per_rank
    kinds = {action.kind for actions in schedule.actions for action in actions}
    assert kinds == ({F, I, W} if spec.splits_backward else {F, B})
    assert run(schedule).length >= 3 * microbatches


def test_placements():
    assert round_robin(3) == (0, 1, 2)
    assert round_robin(2, 3) == (0, 1, 0, 1, 0, 1)
    assert v_shape(3) == (0, 1, 2, 2, 1, 0)


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "zb-h1", "zb-2p"])
def test_diagram_in_docstring(name):
    """The diagrams show two ranks, three micro-batches and actions of equal length."""
    spec = SCHEDULES[name]
    timeline = simulate(spec.builder(2, 3), {kind: [1.0, 1.0] for kind in ActionKind})
    lines = [line.split()[2:] for line in (spec.builder.__doc__ or "").splitlines() if line.strip().startswith("rank")]
    assert len(lines) == 2
    for cells, spans in zip(lines, timeline.spans, strict=True):
        expected = [(cell, time) for time, cell in enumerate(cells) if cell != "."]
        assert [(f"{action.kind}{action.microbatch}", start) for action, start, _ in spans] == expected


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("ranks", "microbatches"), SIZES)
def test_bubble_of_gpipe_and_1f1b(name, ranks, microbatches):
    """The bubble is (p − 1) / (m + p − 1) for stages of equal cost (Narayanan et al. 2021, arXiv 2104.04473, §2.2)."""
    timeline = run(SCHEDULES[name].builder(ranks, microbatches))
    assert timeline.bubble == pytest.approx((ranks - 1) / (microbatches + ranks - 1))
    assert timeline.length == pytest.approx(3 * (microbatches + ranks - 1))


@pytest.mark.parametrize(("ranks", "microbatches"), SIZES)
def test_memory_of_gpipe_and_1f1b(ranks, microbatches):
    assert peak_activations(SCHEDULES["gpipe"].builder(ranks, microbatches)) == (microbatches,) * ranks
    assert peak_activations(SCHEDULES["1f1b"].builder(ranks, microbatches)) == tuple(
        min(microbatches, ranks - r) for r in range(ranks)
    )


@pytest.mark.parametrize("chunks", [2, 3])
@pytest.mark.parametrize(("ranks", "microbatches"), [(1, 4), (2, 2), (2, 4), (3, 9), (4, 8), (8, 16)])
def test_bubble_of_interleaved(ranks, microbatches, chunks):
    """The bubble is (p − 1)(F + B) / v where p divides m (Narayanan et al. 2021, arXiv 2104.04473, §2.2)."""
    timeline = run(interleaved(ranks, microbatches, chunks))
    assert timeline.length == pytest.approx(3 * (microbatches + (ranks - 1) / chunks))


@given(ranks=st.integers(1, 6), microbatches=st.integers(1, 20), chunks=st.integers(1, 3))
def test_memory_of_interleaved(ranks, microbatches, chunks):
    first_group = -(-microbatches // max(1, microbatches // ranks))
    limits = [2 * (ranks - 1 - r) + (chunks - 1) * first_group + 1 for r in range(ranks)]
    schedule = interleaved(ranks, microbatches, chunks)
    assert peak_activations(schedule) == tuple(min(chunks * microbatches, limit) for limit in limits)


def test_interleaved_with_an_uneven_number_of_microbatches():
    """Two ranks, five micro-batches: groups of three and two pass through stages 0 and 1, then 2 and 3."""
    assert text(interleaved(2, 5)) == [
        "F0.0 F0.1 F0.2 F2.0 F2.1 F2.2 B2.0 F0.3 B2.1 F0.4 B2.2 F2.3 B0.0 F2.4 B0.1 B0.2 B2.3 B2.4 B0.3 B0.4",
        "F1.0 F1.1 F1.2 F3.0 B3.0 F3.1 B3.1 F3.2 B3.2 F1.3 B1.0 F1.4 B1.1 F3.3 B1.2 F3.4 B3.3 B3.4 B1.3 B1.4",
    ]


@pytest.mark.parametrize(("ranks", "microbatches"), [(1, 4), (2, 4), (3, 6), (4, 8), (4, 16), (8, 16), (8, 32)])
def test_bubble_and_memory_of_zero_bubble_schedules(ranks, microbatches):
    """Compare with table 2 of Qi et al. 2023 for F = I = W.

    The bubble is p − 1 for ZB-H1, and zero between a rank's first and last action for ZB-2p. The memory equals that of
    1F1B for ZB-H1 and ZB-V, and is at most twice that for ZB-2p.
    """
    schedules = [SCHEDULES[name].builder(ranks, microbatches) for name in ("zb-h1", "zb-2p", "zb-v")]
    h1, zb_2p, zb_v = map(run, schedules)
    assert h1.length == zb_2p.length == pytest.approx(3 * microbatches + ranks - 1)
    for spans in zb_2p.spans:
        assert spans[-1][2] - spans[0][1] == pytest.approx(3 * microbatches)
    assert zb_v.length <= 3 * microbatches + (ranks - 1) / 2 + 1  # the greedy lists exceed the start-up by at most F
    h1_peak, zb_2p_peak, zb_v_peak = (max(peak_activations(schedule)) for schedule in schedules)
    assert h1_peak <= ranks
    assert zb_2p_peak == min(microbatches, 2 * ranks - 1)
    assert zb_v_peak <= 2 * ranks  # each has half the layers of a 1F1B stage


@pytest.mark.parametrize("name", ["zb-h1", "zb-2p"])
@pytest.mark.parametrize(("ranks", "microbatches"), [(3, 2), (3, 4), (4, 9)])
def test_warmup_and_delay_of_weight_gradients(name, ranks, microbatches):
    """Rank r starts with p − r or 2(p − r) − 1 forwards, and delays W by r or 2r micro-batches."""
    twice = name == "zb-2p"
    for r, actions in enumerate(SCHEDULES[name].builder(ranks, microbatches).actions):
        warmup = [action.kind for action in actions].index(I)
        assert warmup == min(microbatches, 2 * (ranks - r) - 1 if twice else ranks - r)
        for i in range(microbatches):
            before = {a.microbatch for a in actions[: actions.index(Action(W, r, i))] if a.kind is I}
            assert before == set(range(min(microbatches, i + (2 * r if twice else r) + 1)))


@given(ranks=st.integers(1, 5), microbatches=st.integers(1, 12))
@settings(deadline=None, max_examples=40)
def test_zb_v_starts_the_best_action_that_is_ready(ranks, microbatches):
    """Priority is I, F, W, then the later stage; a rank that keeps 2p activations runs no forward."""
    schedule = SCHEDULES["zb-v"].builder(ranks, microbatches)
    timeline = simulate(schedule, {kind: [1.0] * schedule.stages for kind in ActionKind})
    end = {action: stop for spans in timeline.spans for action, _, stop in spans}
    for spans in timeline.spans:
        free, kept = 0.0, 0
        remaining = [action for action, _, _ in spans]
        for action, started, ended in spans:
            ready = [
                (
                    max([free, *(end[needed] for needed in dependencies(a, schedule.stages))]),
                    "IFW".index(a.kind),
                    -a.stage,
                )
                for a in {(a.kind, a.stage): a for a in reversed(remaining)}.values()
                if a.kind is not F or kept < 2 * ranks
            ]
            assert (started, "IFW".index(action.kind), -action.stage) == min(ready)
            kept += {F: 1, W: -1}.get(action.kind, 0)
            remaining.remove(action)
            free = ended


@pytest.mark.parametrize(("ranks", "microbatches"), [(1, 2), (2, 4), (2, 9), (3, 6), (4, 8), (4, 17), (8, 16)])
def test_bubble_memory_and_pairs_of_dualpipev(ranks, microbatches):
    """For m ≥ 2p the only bubble is the wait for the first micro-batch, which no schedule with these stages avoids.

    In the steady state every backward follows a forward of the other stage, and so do p − 1 − r later ones.
    """
    schedule = SCHEDULES["dualpipev"].builder(ranks, microbatches)
    assert run(schedule).length == 3 * microbatches + (ranks - 1) / 2
    assert max(peak_activations(schedule)) == 2 * ranks + 1
    for r, actions in enumerate(schedule.actions):
        pairs = [(a, b) for a, b in pairwise(actions) if (a.kind, b.kind) == (F, I) and a.stage != b.stage]
        assert len(pairs) == 2 * (microbatches - 2 * ranks + r + 1) + ranks - 1 - r


@pytest.mark.parametrize(("ranks", "microbatches"), [(1, 2), (2, 4), (3, 6), (4, 8), (4, 17), (8, 16)])
def test_dualpipev_has_the_order_of_torch(ranks, microbatches):
    pipelining = pytest.importorskip("torch.distributed.pipelining")
    if not hasattr(pipelining, "ScheduleDualPipeV"):
        pytest.skip("this version of PyTorch has no DualPipeV")
    words = {"FORWARD": "F", "FULL_BACKWARD": "IW", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W"}

    def names(operation):
        if operation.sub_actions:  # a pair
            return [name for part in operation.sub_actions for name in names(part)]
        kinds = words[operation.computation_type.name]
        return [f"{kind}{operation.stage_index}.{operation.microbatch_index}" for kind in kinds]

    sizes = SimpleNamespace(pp_group_size=ranks, _n_microbatches=microbatches)
    for r, actions in enumerate(SCHEDULES["dualpipev"].builder(ranks, microbatches).actions):
        operations = pipelining.ScheduleDualPipeV._calculate_single_rank_operations(sizes, r)
        assert [name for operation in operations for name in names(operation)] == list(map(str, actions))


@pytest.mark.parametrize(("forward", "split"), [(1.0, 0.5), (1.0, 0.6), (1.0, 0.7), (1.25, 0.6), (1.0, 0.4)])
@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 4), (4, 8), (4, 16), (8, 16)])
def test_dualpipev_is_no_slower_than_the_others_from_2p_micro_batches(ranks, microbatches, forward, split):
    """split: share of I in the backward, which takes 2. The exchange of an MoE layer makes F and I longer than W."""
    costs = {F: forward, I: 2 * split, W: 2 * (1 - split), B: 2.0}
    lengths = {}
    for name, spec in SCHEDULES.items():
        schedule = spec.builder(ranks, microbatches)
        per_stage = {kind: [cost / spec.stages_per_rank] * schedule.stages for kind, cost in costs.items()}
        lengths[name] = simulate(schedule, per_stage).length
    assert lengths["dualpipev"] == pytest.approx(min(lengths.values()))


@pytest.mark.parametrize("placement", [(0,), (0, 1, 2), (0, 1, 0, 1), (0, 1, 1, 0)])
@pytest.mark.parametrize("microbatches", [1, 2, 5])
def test_forward_only(placement, microbatches):
    """Each rank runs its forwards in the order in which they can start."""
    schedule = forward_only(placement, microbatches)
    simulate(schedule, {F: [1.0] * len(placement)})  # valid
    for rank, actions in enumerate(schedule.actions):
        stages = [s for s, r in enumerate(placement) if r == rank]
        expected = sorted((s + i, s, Action(F, s, i)) for s in stages for i in range(microbatches))
        assert list(actions) == [action for _, _, action in expected]


def test_dependencies():
    assert dependencies(Action(F, 0, 1), 3) == []
    assert dependencies(Action(F, 2, 1), 3) == [Action(F, 1, 1)]
    assert dependencies(Action(B, 2, 1), 3) == [Action(F, 2, 1)]
    assert dependencies(Action(B, 1, 1), 3) == [Action(F, 1, 1), Action(B, 2, 1)]
    assert dependencies(Action(I, 0, 1), 3) == [Action(F, 0, 1), Action(I, 1, 1)]
    assert dependencies(Action(W, 1, 1), 3) == [Action(I, 1, 1)]
