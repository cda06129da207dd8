"""The engine executes a schedule on one rank: receive, compute, send.

rank r − 1                              rank r (this engine)                              rank r + 1
F(s − 1, i) ──► Message(FORWARD, s, i) ──► F(s, i) ──► Message(FORWARD, s + 1, i) ──► F(s + 1, i)
B(s − 1, i) ◄── Message(BACKWARD, s − 1, i) ◄── B(s, i) ◄── Message(BACKWARD, s, i) ◄── B(s + 1, i)

[1] Before an action, post the receives for this action and the next ones, in the order in which they are sent.
[2] Take the action's message: wait for its receive, or use the tensor stored by another stage of the same rank.
[3] Compute.
[4] Deliver the result as a message to the stage that needs it. Sends are asynchronous.
[5] At the end of the step, wait until all sends are complete.
"""

import functools
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.clock import clock_of
from pipeline.messages import Channel, Direction, Message
from pipeline.mpi.activity import doing
from pipeline.schedule import Action, ActionKind, Schedule
from pipeline.stage import Stage

LOOK_AHEAD = 3  # number of actions whose receives are posted, so that messages arrive while others are computed


@dataclass
class MicroBatch:
    """One micro-batch. inputs: for the first stage. context: passed to every layer and to the objective.

    boundary: the shape of the tensor that is sent from stage to stage. Every rank of the pipeline has the micro-batch,
    so that shapes are not exchanged. The first dim may have size zero.
    """

    inputs: Tensor
    boundary: torch.Size
    context: Any = None


class Engine:
    """Runs schedules over the stages of this rank.

    stages: the stages of this rank by number. objective(output, context) → (scalar to differentiate, scalar to report):
    called on the rank that holds the last stage. rank: of this process in the pipeline. channels: those of this rank,
    with the process groups of their two ranks. dtype: of the tensors that a stage takes. message_dtype: in which
    they are sent between ranks (default: dtype).
    """

    def __init__(
        self,
        stages: Mapping[int, Stage],
        objective: Callable[[Tensor, Any], tuple[Tensor, Tensor]],
        rank: int = 0,
        channels: Mapping[Channel, dist.ProcessGroup] | None = None,
        dtype: torch.dtype = torch.float32,
        message_dtype: torch.dtype | None = None,
    ) -> None:
        self.stages = stages
        self.objective = objective
        self.dtype = dtype
        self.message_dtype = message_dtype or dtype
        self.rank = rank
        self.channels = channels or {}
        self.clock = clock_of(next(iter(stages.values())).input_device)
        self._waits: list[tuple[Any, Any]] = []  # marks of the clock before and after each wait of the last run
        self._trace: list[tuple[Action, Any, Any]] | None = None
        self._origin: Any = None  # mark of the clock at the start of the trace

    def run(
        self,
        schedule: Schedule,
        microbatches: Sequence[MicroBatch],
        around_backward: Callable[[Action, bool], AbstractContextManager[object]] = lambda action, last: nullcontext(),
    ) -> list[Tensor]:
        """Execute this rank's actions. Gradients are added to the parameters' `.grad`.

        around_backward: called with each action of a backward, and whether it is the last one of its stage, after which
        the gradients of the stage are complete. The action runs in the context manager that it returns.
        Returns the reported scalar of each micro-batch where this rank holds the last stage, else an empty list.
        Raises ValueError when the schedule is for another number of micro-batches.
        """
        if len(microbatches) != schedule.microbatches:
            raise ValueError(f"the schedule is for {schedule.microbatches} micro-batches, not {len(microbatches)}")
        actions = schedule.actions[self.rank]
        last = {action.stage: action for action in actions if action.kind is not ActionKind.FORWARD}  # of each stage
        run = _ScheduleRun(self, schedule, microbatches)
        self._waits = []
        try:
            with torch.set_grad_enabled(bool(last)):
                for position, action in enumerate(actions):
                    for upcoming in actions[position : position + LOOK_AHEAD]:
                        run.post_receives(upcoming)
                    backward = action.kind is not ActionKind.FORWARD
                    with around_backward(action, action is last[action.stage]) if backward else nullcontext():
                        start, end = run.execute(action)
                    if self._trace is not None:
                        self._trace.append((action, start, end))
                run.wait_for_sends()
        finally:
            for stage in self.stages.values():
                stage.clear()
        return run.reports

    def run_stages(self, microbatch: MicroBatch) -> None:
        """Run the forward of each stage of this rank, and its backward if gradients are enabled, without messages.

        Inputs of stages are random numbers and gradients of outputs are ones, so that results have no meaning.
        """
        generator = torch.Generator().manual_seed(0)
        for number, stage in self.stages.items():
            x = microbatch.inputs
            if number:
                x = torch.randn(microbatch.boundary, generator=generator, dtype=self.dtype)
            y = stage.forward(0, x.to(stage.input_device), microbatch.context)
            if torch.is_grad_enabled():
                stage.backward(0, torch.ones_like(y))

    def waited(self) -> float:
        """Seconds of the last run in which this rank's work waited for other ranks."""
        return sum(self.clock.seconds(start, end) for start, end in self._waits)

    def start_trace(self) -> None:
        """Record the actions from now on."""
        self._trace = []
        self._origin = self.clock.mark()

    def stop_trace(self) -> list[tuple[Action, float, float]]:
        """The actions since `start_trace` with their start and their end, in seconds.

        An action starts when it has its message.
        """
        recorded, self._trace = self._trace or [], None
        seconds = functools.partial(self.clock.seconds, self._origin)
        return [(action, seconds(start), seconds(end)) for action, start, end in recorded]

    def wait(self, works: Iterable[dist.Work]) -> None:
        """Wait for messages, and count the time."""
        start = self.clock.mark()
        for work in works:
            work.wait()
        self._waits.append((start, self.clock.mark()))


class _ScheduleRun:
    """The state of one run of a schedule on one rank: messages received and in transit, and the reports."""

    def __init__(self, engine: Engine, schedule: Schedule, microbatches: Sequence[MicroBatch]) -> None:
        self.engine = engine
        self.schedule = schedule
        self.microbatches = microbatches
        self.last = schedule.stages - 1
        self.local: dict[Message, Tensor] = {}  # from this rank to itself
        self.receiving: dict[Message, tuple[dist.Work, Tensor]] = {}
        self.sending: list[tuple[dist.Work, Tensor]] = []  # tensors must not be freed before they are sent
        self.reports: list[Tensor] = []
        # For each channel to this rank, its messages in the order in which they are sent. NCCL matches messages by
        # their order instead of a tag, so receives are posted in this order.
        self.expected: dict[Channel, deque[Message]] = defaultdict(deque)
        incoming = {self._incoming_channel(_message_to(action)) for action in schedule.actions[engine.rank]} - {None}
        for source in {channel.source for channel in cast(set[Channel], incoming)}:
            for action in schedule.actions[source]:
                message = self._message_from(action)
                if message and schedule.placement[message.stage] == engine.rank:
                    self.expected[Channel(message.direction, source, engine.rank)].append(message)

    def post_receives(self, action: Action) -> None:
        """[1] Post the receive of an action's message, if it comes from another rank and is not posted yet.

        The receives of messages that the same channel carries earlier are posted first.
        """
        needed = _message_to(action)
        channel = self._incoming_channel(needed)
        if channel is None:
            return
        waiting = self.expected[channel]
        while needed in waiting:
            message = waiting.popleft()
            # Also for a gradient the input device is used: autograd moves the gradient to the device of the output.
            device = self.engine.stages[message.stage].input_device
            boundary = self.microbatches[message.microbatch].boundary
            buffer = torch.empty(boundary, dtype=self.engine.message_dtype, device=device)
            group, peer = self._group(channel)
            work = dist.irecv(buffer, group=group, group_src=peer, tag=self._tag(message))
            self.receiving[message] = cast(dist.Work, work), buffer

    def execute(self, action: Action) -> tuple[Any, Any]:
        """[2] to [4] for one action. Returns marks of the clock after the wait for its message and at its end."""
        with doing(action.describe()):
            tensor = self._input(action)  # [2]
            start = self.engine.clock.mark()
            if tensor is None:
                self.engine.stages[action.stage].backward_weight(action.microbatch)  # [3]
            elif action.kind is ActionKind.FORWARD:
                self._forward(action, tensor)
            else:
                self._backward(action, tensor)
            return start, self.engine.clock.mark()

    def wait_for_sends(self) -> None:
        """[5] Wait until all messages have been sent."""
        self.engine.wait(work for work, _ in self.sending)

    def _forward(self, action: Action, x: Tensor) -> None:
        _, stage, i = action
        context = self.microbatches[i].context
        y = self.engine.stages[stage].forward(i, x, context)  # [3]
        if message := self._message_from(action):
            self._deliver(message, y.detach())  # [4]
            return
        loss, report = self.engine.objective(y, context)
        self.reports.append(report.detach())
        if torch.is_grad_enabled():
            (self.local[Message(Direction.BACKWARD, stage, i)],) = torch.autograd.grad(loss, y)

    def _backward(self, action: Action, grad_output: Tensor) -> None:
        """Run a full backward, or the first part of a split one."""
        kind, stage, i = action
        module = self.engine.stages[stage]
        backward = module.backward if kind is ActionKind.BACKWARD else module.backward_input
        grad_input = backward(i, grad_output)  # [3]
        if message := self._message_from(action):
            if grad_input is None:
                raise RuntimeError(f"stage {stage} returned no gradient for its input, which must be floating-point")
            self._deliver(message, grad_input)  # [4]

    def _message_from(self, action: Action) -> Message | None:
        """The message that an action sends to another stage; None at the ends of the pipeline and for weights."""
        kind, stage, i = action
        if kind is ActionKind.FORWARD:
            return Message(Direction.FORWARD, stage + 1, i) if stage < self.last else None
        if kind is ActionKind.BACKWARD_WEIGHT or stage == 0:
            return None
        return Message(Direction.BACKWARD, stage - 1, i)

    def _incoming_channel(self, message: Message) -> Channel | None:
        """The channel that brings a message; None if it comes from this rank, the inputs or the objective."""
        sender = message.stage + (-1 if message.direction is Direction.FORWARD else 1)
        if not 0 <= sender <= self.last:
            return None
        source = self.schedule.placement[sender]
        return None if source == self.engine.rank else Channel(message.direction, source, self.engine.rank)

    def _input(self, action: Action) -> Tensor | None:
        """The tensor that an action takes, after the wait for its message; None for BACKWARD_WEIGHT."""
        kind, stage, i = action
        if kind is ActionKind.BACKWARD_WEIGHT:
            return None
        if kind is ActionKind.FORWARD and stage == 0:
            return self.microbatches[i].inputs.to(self.engine.stages[0].input_device, non_blocking=True)
        message = _message_to(action)
        if message in self.local:
            return self.local.pop(message)
        work, buffer = self.receiving.pop(message)
        self.engine.wait([work])
        return buffer.to(self.engine.dtype)

    def _deliver(self, message: Message, tensor: Tensor) -> None:
        """Start sending a message to the rank of its stage, or store it if the stage is on this rank."""
        rank = self.schedule.placement[message.stage]
        if rank == self.engine.rank:
            self.local[message] = tensor.to(self.engine.stages[message.stage].input_device)
            return
        self.sending = [(work, kept) for work, kept in self.sending if not work.is_completed()]
        tensor = tensor.to(self.engine.message_dtype).contiguous()
        group, peer = self._group(Channel(message.direction, self.engine.rank, rank))
        work = dist.isend(tensor, group=group, group_dst=peer, tag=self._tag(message))
        self.sending.append((cast(dist.Work, work), tensor))

    def _group(self, channel: Channel) -> tuple[dist.ProcessGroup, int]:
        """The process group of a channel and the other rank's number in it."""
        group = self.engine.channels.get(channel)
        if group is None:
            raise ValueError(f"the engine has no process group for the channel {channel}")
        return group, 1 - dist.get_rank(group)

    def _tag(self, message: Message) -> int:
        return (message.microbatch * self.schedule.stages + message.stage) * 2 + message.direction.value


def _message_to(action: Action) -> Message:
    """The message that an action needs; that of BACKWARD_WEIGHT is the message of its BACKWARD_INPUT."""
    direction = Direction.FORWARD if action.kind is ActionKind.FORWARD else Direction.BACKWARD
    return Message(direction, action.stage, action.microbatch)
