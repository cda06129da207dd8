"""Replay of the engine's operations under NCCL's ordering rules, to find deadlocks without a GPU.

The engine of every rank runs with stand-ins for torch.distributed and for its stages, which record what the host does:

    post       enqueue a send or a receive on the stream of its communicator, after the work that was enqueued so far
    wait       let the compute stream wait for a send or a receive
    compute    enqueue work on the compute stream
    host       the host waits for the compute stream (a value is read)
    device     the host waits for all streams of the device
    rendezvous the host waits for its compute stream and then for all other ranks

`deadlocks` then executes the programs of all ranks. A communicator executes its operations first in, first out, and a
send and its receive run together. If communicators are created at first use, the first `post` blocks the host until
both ranks have come to theirs.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import pipeline.engine
from pipeline.clock import HostClock
from pipeline.engine import Engine, MicroBatch
from pipeline.messages import Channel, channels_of
from pipeline.schedule import Schedule
from tests.pipeline.toy_layers import CPU


class Operation(NamedTuple):
    channel: Channel
    number: int  # of the message in its channel


class Instruction(NamedTuple):
    kind: str
    operation: Operation | None = None


Program = list[Instruction]


class _Work:
    def __init__(self, program: Program, operation: Operation) -> None:
        self.program, self.operation = program, operation

    def wait(self) -> None:
        self.program.append(Instruction("wait", self.operation))

    def is_completed(self) -> bool:
        return False


class _Stage:
    """A stage that records its work. reads: whether the host reads a value of every action, as with counts of rows."""

    input_device = CPU

    def __init__(self, program: Program, reads: bool) -> None:
        self.record = [Instruction("compute"), *[Instruction("host")] * reads]
        self.program = program

    def forward(self, i: int, x: Tensor, context: Any) -> Tensor:
        self.program += self.record
        return torch.zeros(1, requires_grad=True) + 0

    def backward(self, i: int, gradient: Tensor) -> Tensor:
        self.program += self.record
        return torch.zeros(1)

    backward_input = backward

    def backward_weight(self, i: int) -> None:
        self.program += self.record

    def clear(self) -> None:
        pass


class _DeviceClock(HostClock):
    """A clock that waits for the whole device at each mark."""

    def __init__(self, program: Program) -> None:
        self.program = program

    def mark(self) -> float:
        self.program.append(Instruction("device"))
        return 0.0


def record(schedules: Sequence[Schedule], rank: int, reads: bool, device_clock: bool = False) -> Program:
    """The program of a rank that runs the schedules one after another, with a rendezvous after each."""
    program: Program = []
    posted: dict[Channel, int] = defaultdict(int)

    def post(tensor: Tensor, group: Channel, **_: Any) -> _Work:
        operation = Operation(group, posted[group])
        posted[group] += 1
        program.append(Instruction("post", operation))
        return _Work(program, operation)

    placement = schedules[0].placement
    stages: Any = {s: _Stage(program, reads) for s, r in enumerate(placement) if r == rank}
    channels: Any = {channel: channel for channel in channels_of(placement, rank)}
    engine = Engine(stages, lambda y, _: (y.sum(), y.sum()), rank, channels)
    if device_clock:
        engine.clock = _DeviceClock(program)
    with pytest.MonkeyPatch.context() as patch:
        network = SimpleNamespace(isend=post, irecv=post, get_rank=lambda group: 0, Work=_Work)
        patch.setattr(pipeline.engine, "dist", network)
        for schedule in schedules:
            engine.run(schedule, [MicroBatch(torch.zeros(1), torch.Size([1]))] * schedule.microbatches)
            program.append(Instruction("rendezvous"))
    return program


def own_communicator(channel: Channel) -> Hashable:
    """A communicator per channel."""
    return channel


class _Rank:
    def __init__(self, number: int, program: Program) -> None:
        self.number, self.program, self.position = number, program, 0
        self.compute: deque[Instruction] = deque()  # the compute stream
        self.enqueued = self.finished = 0  # instructions of the compute stream
        self.communicators: dict[Hashable, deque[tuple[Operation, int]]] = defaultdict(deque)

    @property
    def instruction(self) -> Instruction | None:
        return self.program[self.position] if self.position < len(self.program) else None


def deadlocks(
    programs: Sequence[Program],
    communicator: Callable[[Channel], Hashable] = own_communicator,
    created_at_first_use: bool = False,
) -> bool:
    """Whether the ranks do not come to the end of their programs. communicator: that of a channel."""
    ranks = [_Rank(number, program) for number, program in enumerate(programs)]
    arrived: dict[Hashable, set[int]] = defaultdict(set)  # ranks at the creation of a communicator
    done: set[Operation] = set()

    def host(rank: _Rank) -> bool:
        """Execute instructions of the host until it blocks; whether there was one."""
        start = rank.position
        while (instruction := rank.instruction) is not None:
            kind, operation = instruction
            idle = not rank.compute
            if kind == "post":
                assert operation is not None
                key = communicator(operation.channel)
                arrived[key].add(rank.number)
                if created_at_first_use and not set(operation.channel[1:]) <= arrived[key]:
                    break
                rank.communicators[key].append((operation, rank.enqueued))
            elif kind in ("wait", "compute"):
                rank.compute.append(instruction)
                rank.enqueued += 1
            elif kind == "device":
                idle = idle and not any(rank.communicators.values())
            if (kind in ("host", "device") and not idle) or kind == "rendezvous":
                break
            rank.position += 1
        return rank.position > start

    def compute(rank: _Rank) -> bool:
        """Execute the compute stream until it waits; whether there was work."""
        start = rank.finished
        while rank.compute and (rank.compute[0].kind == "compute" or rank.compute[0].operation in done):
            rank.compute.popleft()
            rank.finished += 1
        return rank.finished > start

    def transfer(rank: _Rank) -> bool:
        """Execute the sends at the head of this rank's communicators whose receives are at the head of the other's."""
        moved = False
        for key, queue in rank.communicators.items():
            while queue and queue[0][0].channel.source == rank.number:
                operation, work_before = queue[0]
                other = ranks[operation.channel.destination]
                receives = other.communicators[key]
                ready = receives and receives[0][0] == operation and other.finished >= receives[0][1]
                if not ready or rank.finished < work_before:
                    break
                queue.popleft()
                receives.popleft()
                done.add(operation)
                moved = True
        return moved

    while True:
        moved = [step(rank) for rank in ranks for step in (host, compute, transfer)]
        instructions = [rank.instruction for rank in ranks]
        if all(i is not None and i.kind == "rendezvous" for i in instructions) and not any(r.compute for r in ranks):
            for rank in ranks:
                rank.position += 1
        elif not any(moved):
            return any(instructions)
