"""No schedule deadlocks under NCCL's ordering rules, and the simulator finds the deadlocks of other designs."""

from collections.abc import Hashable, Iterator
from contextlib import contextmanager

import pytest

from fira.parallel.overlapped_reduction import OverlappedReduction
from pipeline.mesh import Layout
from pipeline.schedule import SCHEDULES, Action, forward_only
from tests.integration.nccl_order import Group, record
from tests.integration.nccl_replay import deadlocks

MICROBATCHES = range(1, 17)


def pair(group: Group) -> Hashable:
    """What torch.distributed does with a process group of all ranks: a communicator per pair, for both ways."""
    return group.use.direction, *sorted(group.ranks)


def whole_pipeline(group: Group) -> Hashable:
    """A communicator of all ranks for each direction, which is what `device_id` of init_process_group leads to."""
    return group.use.direction


def programs(name: str, ranks: int, microbatches: int, reads: bool = False, device_clock: bool = False):
    """Two training steps with an evaluation between them, as recorded on every rank."""
    step = SCHEDULES[name].builder(ranks, microbatches)
    evaluation = forward_only(step.placement, microbatches)
    return [record([step, evaluation, step], rank, reads, device_clock) for rank in range(ranks)]


def replicated_programs(name: str, layout: Layout, microbatches: int, reductions=(OverlappedReduction,)):
    """The same with replicas, experts on several ranks, and reductions. reductions: by rank, repeated."""
    step = SCHEDULES[name].builder(layout.pp, microbatches)
    evaluation = forward_only(step.placement, microbatches)
    return [
        record(
            [step, evaluation, step],
            rank,
            reads=True,
            layout=layout,
            layers=3,
            reduction=reductions[rank % len(reductions)],
        )
        for rank in range(layout.world)
    ]


@pytest.mark.parametrize("reads", [False, True])
@pytest.mark.parametrize("ranks", [2, 3, 4, *(pytest.param(n, marks=pytest.mark.slow) for n in (5, 6, 7, 8))])
@pytest.mark.parametrize("name", SCHEDULES)
def test_no_deadlock(name, ranks, reads):
    assert [m for m in MICROBATCHES if deadlocks(programs(name, ranks, m, reads))] == []


@pytest.mark.parametrize("name", SCHEDULES)
def test_kernels_are_loaded_before_receives_are_posted_ahead(name):
    """Loading one may wait for the receives, which deadlocks if kernels are loaded at their first use."""

    def deadlocked(ranks: int, microbatches: int, loads: str) -> bool:
        step = SCHEDULES[name].builder(ranks, microbatches)
        schedules = [forward_only(step.placement, microbatches), step, step]
        return deadlocks([record(schedules, rank, reads=False, layers=2, loads=loads) for rank in range(ranks)])

    assert deadlocked(2, 2, "first use")
    assert [(n, m) for n in (2, 3, 4) for m in MICROBATCHES if deadlocked(n, m, "before")] == []


@pytest.mark.parametrize("name", ["1f1b", "gpipe", "zb-h1", "zb-v"])
def test_communicators_created_at_first_use_deadlock(name):
    assert all(deadlocks(programs(name, 2, m, reads=True), pair, created_at_first_use=True) for m in (1, 2, 4))


def test_one_communicator_for_both_ways_deadlocks():
    assert all(deadlocks(programs("zb-v", ranks, 4), pair) for ranks in (2, 3, 4))


def test_one_communicator_for_all_ranks_deadlocks():
    assert deadlocks(programs("1f1b", 4, 8), whole_pipeline)


@pytest.mark.parametrize(
    "layout",
    [
        Layout(1, 2, 1),
        Layout(2, 2, 2),
        *(pytest.param(Layout(*sizes), marks=pytest.mark.slow) for sizes in ((2, 4, 2), (4, 2, 1), (4, 4, 2))),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", SCHEDULES)
def test_no_deadlock_with_reductions_during_the_backward(name, layout):
    for microbatches in (1, 2, 3, 8):
        programs = replicated_programs(name, layout, microbatches)
        assert not deadlocks(programs)
        step = programs[0][: [instruction.kind for instruction in programs[0]].index("rendezvous")]
        reductions = [
            i.operation.group.use for i in step if i.kind == "post" and i.operation.group.use in ("dp", "edp")
        ]
        layers = 3 * SCHEDULES[name].stages_per_rank
        assert reductions.count("dp") == layers
        assert reductions.count("edp") == (layers if layout.dp > layout.ep else 0)
        # The reduction of the upper layer starts before the end of the last backward.
        first = next(place for place, i in enumerate(step) if i.kind == "post" and i.operation.group.use == "dp")
        assert "compute" in [instruction.kind for instruction in step[first:]]


class Ascending(OverlappedReduction):
    """Starts the layers of a stage in ascending order."""

    @contextmanager
    def around_backward(self, action: Action, last: bool) -> Iterator[None]:
        yield
        for layer in self._stages[action.stage] if last else ():
            self._start_layer(layer)


def test_different_orders_of_reductions_on_two_replicas_deadlock():
    programs = replicated_programs("1f1b", Layout(2, 2, 1), 4, (OverlappedReduction, Ascending))
    assert deadlocks(programs)
    assert not deadlocks(replicated_programs("1f1b", Layout(2, 2, 1), 4))


def test_waiting_for_the_device_between_actions_deadlocks():
    """A trace that synchronizes the device waits for the receives that are posted ahead."""
    assert deadlocks(programs("1f1b", 2, 4, device_clock=True))
