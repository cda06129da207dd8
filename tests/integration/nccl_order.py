"""Record the operations of the engine, which nccl_replay.py executes under NCCL's ordering rules.

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
OverlappedReduction starts in the last backward of a stage. nccl_replay.py executes the programs of all ranks.
"""

from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import pipeline.engine as pipeline_engine
from fira.parallel import overlapped_reduction
from fira.parallel.overlapped_reduction import OverlappedReduction
from fira.parallel.param_shard import ParamShard
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
            ParamShard(f"layers.{i}.w", parameter, 0, (i + 1,), expert, parameter)
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
            engine.run(schedule, microbatches, overlapped.around_backward)
            overlapped.finish()
            program.append(Instruction("rendezvous"))
    return program
