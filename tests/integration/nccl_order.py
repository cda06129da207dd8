"""Replay of the engine's operations under NCCL's ordering rules, to find deadlocks without a GPU.

The engine of every rank runs with stand-ins for torch.distributed and for its stages, which record what the host does:

    post       enqueue an operation on the stream of its communicator, after the work that was enqueued so far
    wait       let the compute stream wait for an operation
    compute    enqueue work on the compute stream
    host       the host waits for the compute stream (a value is read)
    device     the host waits for all streams of the device
    rendezvous the host waits for its compute stream and then for all other ranks

Where kernels are loaded at their first use, the host waits for the device before the first forward of a rank in
evaluation and in training, and before its first backward.

An operation is a message between two pipeline ranks, an all-to-all over ep, or a reduction over dp or edp, which
OverlappedReduction starts in the last backward of a stage. `deadlocks` then executes the programs of all ranks. A
communicator executes its operations first in, first out, and an operation runs when it is the next one on all of its
ranks. If communicators are created at first use, the first `post` blocks the host until all ranks have come to theirs.
"""

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Hashable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import pipeline.engine as pipeline_engine
from fira.parallel import overlapped_reduction
from fira.parallel.overlapped_reduction import OverlappedReduction
from fira.parallel.parallelize import ParamShard
from pipeline.clock import HostClock
from pipeline.engine import Engine, MicroBatch
from pipeline.mesh import Layout
from pipeline.messages import Channel, channels_of
from pipeline.schedule import ActionKind, Schedule
from tests.pipeline.toy_layers import CPU


class Group(NamedTuple):
    """A process group. use: the channel, for messages, or the axis of the mesh. ranks: the sender first."""

    use: Channel | str
    ranks: tuple[int, ...]


class Operation(NamedTuple):
    group: Group
    number: int  # in its group
    sizes: tuple[int, ...] = ()  # of the tensors of a reduction


class Instruction(NamedTuple):
    kind: str
    operation: Operation | None = None


class Program(list[Instruction]):
    """What one rank does."""

    def __init__(self, loads: bool = False) -> None:
        super().__init__()
        self.posted: Counter[Group] = Counter()
        self.loads = loads
        self.loaded: set[tuple[str, bool]] = set()

    def load(self, kernels: str) -> None:
        """Load the kernels of the forward or of the backward, unless they are loaded."""
        if self.loads and (kernels, torch.is_grad_enabled()) not in self.loaded:
            self.loaded.add((kernels, torch.is_grad_enabled()))
            self.append(Instruction("device"))

    def post(self, group: Group, sizes: tuple[int, ...] = ()) -> "_Work":
        operation = Operation(group, self.posted[group], sizes)
        self.posted[group] += 1
        self.append(Instruction("post", operation))
        return _Work(self, operation)


class _Work:
    def __init__(self, program: Program, operation: Operation) -> None:
        self.program, self.operation = program, operation

    def wait(self) -> None:
        self.program.append(Instruction("wait", self.operation))

    def is_completed(self) -> bool:
        return False


class _Layer:
    """A layer that records its work, with one replicated parameter and one of its experts.

    reads: whether the host reads a value of every layer, as with counts of rows. experts: the group over ep.
    """

    def __init__(self, program: Program, reads: bool, experts: Group, size: int) -> None:
        self.program, self.reads, self.experts = program, reads, experts
        self.parameters = [torch.zeros(size, requires_grad=True), torch.zeros(size, requires_grad=True)]

    def compute(self, exchange: bool = False) -> None:
        self.program.append(Instruction("compute"))
        if exchange and len(self.experts.ranks) > 1:
            self.program.post(self.experts).wait()
        self.program += [Instruction("host")] * self.reads

    def accumulate(self) -> None:
        for parameter in self.parameters:
            parameter.sum().backward()


class _Stage:
    """A stage that records the work of its layers."""

    input_device = CPU

    def __init__(self, layers: list[_Layer]) -> None:
        self.layers = layers

    def forward(self, i: int, x: Tensor, context: Any) -> Tensor:
        self.layers[0].program.load("forward")
        for layer in self.layers:
            layer.compute(exchange=True)
        return torch.zeros(1, requires_grad=True) + 0

    def backward(self, i: int, gradient: Tensor) -> Tensor:
        self.layers[0].program.load("backward")
        for layer in reversed(self.layers):
            layer.compute(exchange=True)
            layer.accumulate()
        return torch.zeros(1)

    def backward_input(self, i: int, gradient: Tensor) -> Tensor:
        self.layers[0].program.load("backward")
        for layer in reversed(self.layers):
            layer.compute(exchange=True)
        return torch.zeros(1)

    def backward_weight(self, i: int) -> None:
        for layer in reversed(self.layers):
            layer.compute()
            layer.accumulate()

    def clear(self) -> None:
        pass


class _ReductionGroup:
    """A process group that records its reductions."""

    def __init__(self, program: Program, group: Group) -> None:
        self.program, self.group = program, group

    def allreduce_coalesced(self, tensors: list[Tensor]) -> _Work:
        return self.program.post(self.group, tuple(map(len, tensors)))


class _DeviceClock(HostClock):
    """A clock that waits for the whole device at each mark."""

    def __init__(self, program: Program) -> None:
        self.program = program

    def mark(self) -> float:
        self.program.append(Instruction("device"))
        return 0.0


def record(
    schedules: Sequence[Schedule],
    rank: int,
    reads: bool,
    device_clock: bool = False,
    layout: Layout | None = None,
    layers: int = 1,
    reduction: type[OverlappedReduction] = OverlappedReduction,
    loads: str = "",
) -> Program:
    """The program of a rank that runs the schedules one after another, with a rendezvous after each.

    layout: by default a pipeline without replicas. layers: of each stage. loads: when kernels are loaded: "first use",
    or "before" the first step and the first evaluation, as `Trainer` does; by default they need not be loaded.
    """
    program = Program(bool(loads))
    placement = schedules[0].placement
    layout = layout or Layout(max(placement) + 1)
    pipeline = layout.group("pp", rank)
    place = pipeline.index(rank)
    groups = {axis: Group(axis, tuple(layout.group(axis, rank))) for axis in ("dp", "edp", "ep")}
    ranges = [range(stage * layers, (stage + 1) * layers) for stage in range(len(placement))]
    stages: Any = {
        s: _Stage([_Layer(program, reads, groups["ep"], i + 1) for i in ranges[s]])
        for s, owner in enumerate(placement)
        if owner == place
    }
    channels: Any = {c: Group(c, (pipeline[c.source], pipeline[c.destination])) for c in channels_of(placement, place)}
    engine = Engine(stages, lambda y, _: (y.sum(), y.sum()), place, channels)
    if device_clock:
        engine.clock = _DeviceClock(program)
    model: Any = SimpleNamespace(
        stages=ranges,
        tied=None,
        shards=[
            ParamShard(f"layers.{i}.w", parameter, 0, (i + 1,), expert)
            for s in stages
            for i, layer in zip(ranges[s], stages[s].layers, strict=True)
            for expert, parameter in enumerate(layer.parameters)
        ],
    )
    mesh: Any = SimpleNamespace(
        groups={axis: _ReductionGroup(program, groups[axis]) for axis in ("dp", "edp")}, ep_groups=[None]
    )
    with pytest.MonkeyPatch.context() as patch:
        post = lambda tensor, group, **_: program.post(group)  # noqa: E731
        network = SimpleNamespace(isend=post, irecv=post, get_rank=lambda group: 0, Work=_Work)
        patch.setattr(pipeline_engine, "dist", network)
        size = SimpleNamespace(get_world_size=lambda group: len(group.group.ranks))
        patch.setattr(overlapped_reduction, "dist", size)
        overlapped = reduction(model, mesh)
        for schedule in schedules:
            microbatches = [MicroBatch(torch.zeros(1), torch.Size([1]))] * schedule.microbatches
            if loads == "before":
                with torch.set_grad_enabled(any(a.kind is not ActionKind.FORWARD for a in schedule.actions[place])):
                    engine.run_stages(microbatches[0])
            engine.run(schedule, microbatches, overlapped.stage)
            overlapped.finish()
            program.append(Instruction("rendezvous"))
    return program


def own_communicator(group: Group) -> Hashable:
    """A communicator per process group."""
    return group


class _Rank:
    def __init__(self, number: int, program: Program) -> None:
        self.number, self.program, self.position = number, program, 0
        self.compute: deque[Instruction] = deque()  # the compute stream
        self.enqueued = self.finished = 0  # instructions of the compute stream
        self.communicators: dict[Hashable, list[tuple[Operation, int]]] = defaultdict(list)

    @property
    def instruction(self) -> Instruction | None:
        return self.program[self.position] if self.position < len(self.program) else None


def deadlocks(
    programs: Sequence[Program],
    communicator: Callable[[Group], Hashable] = own_communicator,
    created_at_first_use: bool = False,
) -> bool:
    """Whether the ranks do not come to the end of their programs. communicator: that of a process group."""
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
                key = communicator(operation.group)
                arrived[key].add(rank.number)
                if created_at_first_use and not set(operation.group.ranks) <= arrived[key]:
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
        """Execute the operations at the head of this rank's communicators that are at the head on all their ranks."""
        moved = False
        for key, queue in rank.communicators.items():
            while queue and queue[0][0].group.ranks[0] == rank.number:
                operation, _ = queue[0]
                members = [ranks[number] for number in operation.group.ranks]
                heads = [member.communicators[key][:1] for member in members]
                if not all(head and head[0][0] == operation for head in heads):
                    break
                if any(member.finished < head[0][1] for member, head in zip(members, heads, strict=True)):
                    break
                for member in members:
                    del member.communicators[key][0]
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
