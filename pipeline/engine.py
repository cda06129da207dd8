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

import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor

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


class Direction(Enum):
    FORWARD = 0  # the output of stage − 1
    BACKWARD = 1  # the input gradient of stage + 1


class Message(NamedTuple):
    """The tensor that a stage receives for a micro-batch: its input, or the gradient of its output."""

    direction: Direction
    stage: int  # the receiver
    microbatch: int


class Engine:
    """Runs schedules over the stages of this rank.

    stages: the stages of this rank by number. objective(output, context) → (scalar to differentiate, scalar to report):
    called on the rank that holds the last stage. forward_group, backward_group: the pipeline's process groups for
    activations and for gradients; None where all stages are on this rank. dtype: of the tensors between stages.
    """

    def __init__(
        self,
        stages: Mapping[int, Stage],
        objective: Callable[[Tensor, Any], tuple[Tensor, Tensor]],
        forward_group: dist.ProcessGroup | None = None,
        backward_group: dist.ProcessGroup | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.stages = stages
        self.objective = objective
        self.dtype = dtype
        self.groups = {Direction.FORWARD: forward_group, Direction.BACKWARD: backward_group}
        self.rank = 0 if forward_group is None else dist.get_rank(forward_group)
        self.waited = 0.0  # seconds of the last run spent waiting for other ranks
        self.trace: list[tuple[Action, float, float]] | None = None  # a list: append (action, start, end)

    def run(self, schedule: Schedule, microbatches: Sequence[MicroBatch]) -> list[Tensor]:
        """Execute this rank's actions. Gradients are added to the parameters' `.grad`.

        Returns the reported scalar of each micro-batch where this rank holds the last stage, else an empty list.
        Raises ValueError when the schedule is for another number of micro-batches.
        """
        if len(microbatches) != schedule.microbatches:
            raise ValueError(f"the schedule is for {schedule.microbatches} micro-batches, not {len(microbatches)}")
        actions = schedule.actions[self.rank]
        training = any(action.kind is not ActionKind.FORWARD for action in actions)
        run = _ScheduleRun(self, schedule, microbatches)
        self.waited = 0.0
        try:
            with torch.set_grad_enabled(training):
                for position, action in enumerate(actions):
                    for upcoming in actions[position : position + LOOK_AHEAD]:
                        run.post_receives(upcoming)
                    if self.trace is None:
                        run.execute(action)
                    else:
                        self.trace.append(self._timed(run, action))
                run.wait_for_sends()
        finally:
            for stage in self.stages.values():
                stage.clear()
        return run.reports

    def _timed(self, run: "_ScheduleRun", action: Action) -> tuple[Action, float, float]:
        """Execute an action; return it with its start, not counting the wait for its message, and its end.

        The times are those of time.perf_counter, in seconds.
        """
        device = self.stages[action.stage].input_device
        before, waited = time.perf_counter(), self.waited
        run.execute(action)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return action, before + self.waited - waited, time.perf_counter()


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
        # For each neighbour and direction, the messages that it will send here, in its order. NCCL matches messages by
        # their order instead of a tag, so receives are posted in this order.
        self.expected: dict[tuple[int, Direction], deque[Message]] = defaultdict(deque)
        neighbours = {self._source(_message_to(action)) for action in schedule.actions[engine.rank]} - {None}
        for rank in cast(set[int], neighbours):
            for action in schedule.actions[rank]:
                message = self._message_from(action)
                if message and schedule.placement[message.stage] == engine.rank:
                    self.expected[rank, message.direction].append(message)

    def post_receives(self, action: Action) -> None:
        """[1] Post the receive of an action's message, if it comes from another rank and is not posted yet.

        The receives of messages that the same rank sends earlier are posted first.
        """
        needed = _message_to(action)
        source = self._source(needed)
        if source is None:
            return
        waiting = self.expected[source, needed.direction]
        while needed in waiting:
            message = waiting.popleft()
            # Also for a gradient the input device is used: autograd moves the gradient to the device of the output.
            device = self.engine.stages[message.stage].input_device
            boundary = self.microbatches[message.microbatch].boundary
            buffer = torch.empty(boundary, dtype=self.engine.dtype, device=device)
            group = self._group(message)
            work = dist.irecv(buffer, dist.get_global_rank(group, source), group=group, tag=self._tag(message))
            self.receiving[message] = cast(dist.Work, work), buffer

    def execute(self, action: Action) -> None:
        """[2] to [4] for one action."""
        if action.kind is ActionKind.FORWARD:
            self._forward(action)
        elif action.kind is ActionKind.BACKWARD_WEIGHT:
            self.engine.stages[action.stage].backward_weight(action.microbatch)
        else:
            self._backward(action)

    def wait_for_sends(self) -> None:
        """[5] Wait until all messages have been sent."""
        started = time.perf_counter()
        for work, _ in self.sending:
            work.wait()
        self.engine.waited += time.perf_counter() - started

    def _forward(self, action: Action) -> None:
        _, stage, i = action
        batch = self.microbatches[i]
        module = self.engine.stages[stage]
        x = batch.inputs.to(module.input_device) if stage == 0 else self._take(_message_to(action))  # [2]
        y = module.forward(i, x, batch.context)  # [3]
        if message := self._message_from(action):
            self._deliver(message, y.detach())  # [4]
            return
        loss, report = self.engine.objective(y, batch.context)
        self.reports.append(report.detach())
        if torch.is_grad_enabled():
            (self.local[Message(Direction.BACKWARD, stage, i)],) = torch.autograd.grad(loss, y)

    def _backward(self, action: Action) -> None:
        """Run a full backward, or the first part of a split one."""
        kind, stage, i = action
        module = self.engine.stages[stage]
        backward = module.backward if kind is ActionKind.BACKWARD else module.backward_input
        grad_input = backward(i, self._take(_message_to(action)))  # [2] [3]
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

    def _source(self, message: Message) -> int | None:
        """The rank that sends a message; None if it comes from this rank, the inputs or the objective."""
        sender = message.stage + (-1 if message.direction is Direction.FORWARD else 1)
        if not 0 <= sender <= self.last:
            return None
        rank = self.schedule.placement[sender]
        return None if rank == self.engine.rank else rank

    def _take(self, message: Message) -> Tensor:
        """Wait for the receive of a message and return its tensor."""
        if message in self.local:
            return self.local.pop(message)
        work, buffer = self.receiving.pop(message)
        started = time.perf_counter()
        work.wait()
        self.engine.waited += time.perf_counter() - started
        return buffer

    def _deliver(self, message: Message, tensor: Tensor) -> None:
        """Start sending a message to the rank of its stage, or store it if the stage is on this rank."""
        rank = self.schedule.placement[message.stage]
        if rank == self.engine.rank:
            self.local[message] = tensor.to(self.engine.stages[message.stage].input_device)
            return
        self.sending = [(work, kept) for work, kept in self.sending if not work.is_completed()]
        tensor = tensor.contiguous()
        group = self._group(message)
        work = dist.isend(tensor, dist.get_global_rank(group, rank), group=group, tag=self._tag(message))
        self.sending.append((cast(dist.Work, work), tensor))

    def _group(self, message: Message) -> dist.ProcessGroup:
        group = self.engine.groups[message.direction]
        if group is None:
            raise ValueError("a pipeline over several ranks needs forward_group and backward_group")
        return group

    def _tag(self, message: Message) -> int:
        return (message.microbatch * self.schedule.stages + message.stage) * 2 + message.direction.value


def _message_to(action: Action) -> Message:
    """The message that an action needs; that of BACKWARD_WEIGHT is the message of its BACKWARD_INPUT."""
    direction = Direction.FORWARD if action.kind is ActionKind.FORWARD else Direction.BACKWARD
    return Message(direction, action.stage, action.microbatch)
