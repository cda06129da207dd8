"""Stand-ins for the network, the process groups and the clock of an engine."""

import threading
from collections import defaultdict
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from pipeline.clock import HostClock
from pipeline.messages import Channel, Direction, channels_of


class Group:
    """Stand-in for the process group of a channel. The ranks in it are ordered by their number in the pipeline."""

    def __init__(self, channel: Channel, rank: int) -> None:
        self.channel, self.rank = channel, sorted([channel.source, channel.destination]).index(rank)


def groups_of(placement: Sequence[int], rank: int) -> Any:
    """Return the channels of a rank with their groups."""
    return {channel: Group(channel, rank) for channel in channels_of(placement, rank)}


class Work:
    def __init__(self, wait: Any) -> None:
        self.wait = wait
        self.is_completed = lambda: False


class ManualClock(HostClock):
    """A clock that only `sleep` advances, by whole seconds."""

    now = 0.0

    def mark(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Network:
    """torch.distributed for ranks in threads, which matches messages by their order like NCCL and checks the tags."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.sent: dict[Channel, list[tuple[int, Tensor]]] = defaultdict(list)
        self.tags: dict[Direction, list[int]] = defaultdict(list)
        self.receives: dict[Channel, int] = defaultdict(int)  # number of posted receives

    def dist(self) -> SimpleNamespace:
        return SimpleNamespace(get_rank=lambda group: group.rank, isend=self.isend, irecv=self.irecv, Work=Work)

    def isend(self, tensor: Tensor, group: Group, group_dst: int, tag: int) -> Work:
        assert tensor.is_contiguous()
        assert not tensor.requires_grad
        assert group.rank == sorted(group.channel[1:]).index(group.channel.source) == 1 - group_dst
        with self.changed:
            self.sent[group.channel].append((tag, tensor))
            self.tags[group.channel.direction].append(tag)
            self.changed.notify_all()
        return Work(lambda: None)

    def irecv(self, buffer: Tensor, group: Group, group_src: int, tag: int) -> Work:
        assert group.rank == sorted(group.channel[1:]).index(group.channel.destination) == 1 - group_src
        queue, position = self.sent[group.channel], self.receives[group.channel]
        self.receives[group.channel] += 1

        def wait() -> None:
            with self.changed:
                assert self.changed.wait_for(lambda: len(queue) > position, timeout=20), "deadlock"
            sent_tag, tensor = queue[position]
            assert (sent_tag, tensor.shape, tensor.dtype) == (tag, buffer.shape, buffer.dtype)
            buffer.copy_(tensor)

        return Work(wait)
