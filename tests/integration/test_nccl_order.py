"""No schedule deadlocks under NCCL's ordering rules, and the simulator finds the deadlocks of other designs."""

from collections.abc import Hashable

import pytest

from pipeline.messages import Channel
from pipeline.schedule import SCHEDULES, forward_only
from tests.integration.nccl_order import deadlocks, record

MICROBATCHES = range(1, 17)


def pair(channel: Channel) -> Hashable:
    """What torch.distributed does with a process group of all ranks: a communicator per pair, for both ways."""
    return channel.direction, *sorted((channel.source, channel.destination))


def whole_pipeline(channel: Channel) -> Hashable:
    """A communicator of all ranks for each direction, which is what `device_id` of init_process_group leads to."""
    return channel.direction


def programs(name: str, ranks: int, microbatches: int, reads: bool = False, device_clock: bool = False):
    """Two training steps with an evaluation between them, as recorded on every rank."""
    step = SCHEDULES[name].builder(ranks, microbatches)
    evaluation = forward_only(step.placement, microbatches)
    return [record([step, evaluation, step], rank, reads, device_clock) for rank in range(ranks)]


@pytest.mark.parametrize("reads", [False, True])
@pytest.mark.parametrize("ranks", [2, 3, 4, *(pytest.param(n, marks=pytest.mark.slow) for n in (5, 6, 7, 8))])
@pytest.mark.parametrize("name", SCHEDULES)
def test_no_deadlock(name, ranks, reads):
    assert [m for m in MICROBATCHES if deadlocks(programs(name, ranks, m, reads))] == []


@pytest.mark.parametrize("name", ["1f1b", "gpipe", "zb-h1", "zb-v"])
def test_communicators_created_at_first_use_deadlock(name):
    assert all(deadlocks(programs(name, 2, m, reads=True), pair, created_at_first_use=True) for m in (1, 2, 4))


def test_one_communicator_for_both_ways_deadlocks():
    assert all(deadlocks(programs("zb-v", ranks, 4), pair) for ranks in (2, 3, 4))


def test_one_communicator_for_all_ranks_deadlocks():
    assert deadlocks(programs("1f1b", 4, 8), whole_pipeline)


def test_waiting_for_the_device_between_actions_deadlocks():
    """A trace that synchronizes the device waits for the receives that are posted ahead."""
    assert deadlocks(programs("1f1b", 2, 4, device_clock=True))
