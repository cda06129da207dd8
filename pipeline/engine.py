"""The engine interprets a schedule's actions on one rank: receive, compute, send. One stage is its simplest case."""

import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.schedule import Action, Kind, Schedule
from pipeline.stage import Stage

LOOK_AHEAD = 3  # actions whose receives are posted, so that what they need arrives while others compute


@dataclass
class MicroBatch:
    """inputs go to the first stage, targets to the objective, the context to every layer.

    boundary: the shape of the tensor that crosses from stage to stage. Every rank of the pipeline knows the
    micro-batch, so no shape is negotiated. Its leading size may be zero.
    """

    inputs: Tensor
    targets: Tensor
    boundary: torch.Size
    context: Any = None


class Engine:
    """Runs schedules over the stages of this rank.

    stages: this rank's stages by number. objective(output, targets, context) → (scalar to differentiate, scalar to
    report): called on the rank that holds the last stage. forward_group, backward_group: the pipeline's process
    groups for activations and for gradients; None where all stages are on this rank.
    dtype: of what crosses boundaries.
    """

    def __init__(
        self,
        stages: Mapping[int, Stage],
        objective: Callable[[Tensor, Tensor, Any], tuple[Tensor, Tensor]],
        forward_group: dist.ProcessGroup | None = None,
        backward_group: dist.ProcessGroup | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.stages = stages
        self.objective = objective
        self.dtype = dtype
        self.groups = {Kind.FORWARD: forward_group, Kind.BACKWARD: backward_group}
        self.rank = 0 if forward_group is None else dist.get_rank(forward_group)
        self.waited = 0.0  # seconds of the last run spent waiting for other ranks
        self.trace: list[tuple[Action, float, float]] | None = None  # a list: when each action starts and ends

    def run(self, schedule: Schedule, microbatches: Sequence[MicroBatch]) -> list[Tensor]:
        """Play this rank's actions. Gradients are added to the parameters' `.grad`.

        Returns the reported scalar of each micro-batch where this rank holds the last stage, else an empty list.
        """
        if len(microbatches) != schedule.microbatches:
            raise ValueError(f"the schedule is for {schedule.microbatches} micro-batches, not {len(microbatches)}")
        actions = schedule.actions[self.rank]
        training = any(action.kind is not Kind.FORWARD for action in actions)
        play = _ScheduleRun(self, schedule, microbatches)
        self.waited = 0.0
        try:
            with torch.set_grad_enabled(training):
                for position, action in enumerate(actions):
                    for soon in actions[position : position + LOOK_AHEAD]:
                        play.receive(soon)
                    if self.trace is None:
                        play.act(action)
                    else:
                        self.trace.append(self._timed(play, action))
                play.finish()
        finally:
            for stage in self.stages.values():
                stage.clear()
        return play.reports

    def _timed(self, play: "_ScheduleRun", action: Action) -> tuple[Action, float, float]:
        """Do an action; when it had what it waits for, and when it was done, by time.perf_counter."""
        device = self.stages[action.stage].input_device
        before, waited = time.perf_counter(), self.waited
        play.act(action)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return action, before + self.waited - waited, time.perf_counter()


class _ScheduleRun:
    """One run: what was received, what is under way, what the last stage reported.

    A tensor is named by the action that it is for: the forward that takes it in, or the backward, whole or split, as
    Action(Kind.BACKWARD, …).
    """

    def __init__(self, engine: Engine, schedule: Schedule, microbatches: Sequence[MicroBatch]) -> None:
        self.engine = engine
        self.schedule = schedule
        self.microbatches = microbatches
        self.last = schedule.stages - 1
        self.arrived: dict[Action, Tensor] = {}
        self.receiving: dict[Action, tuple[dist.Work, Tensor]] = {}
        self.sending: list[tuple[dist.Work, Tensor]] = []
        self.reports: list[Tensor] = []
        # What its neighbours will send here, in their order: NCCL has no tags, so receives are posted in that order.
        self.expected: dict[tuple[int, Kind], deque[Action]] = defaultdict(deque)
        neighbours = {self._source(self._input(action)) for action in schedule.actions[engine.rank]} - {None}
        for rank in cast(set[int], neighbours):
            for action in schedule.actions[rank]:
                tensor = self._output(action)
                if tensor and schedule.placement[tensor.stage] == engine.rank:
                    self.expected[rank, tensor.kind].append(tensor)

    def act(self, action: Action) -> None:
        kind, stage, i = action
        module = self.engine.stages[stage]
        if kind is Kind.FORWARD:
            self._forward(action)
        elif kind is Kind.WEIGHT:
            module.backward_weights(i)
        else:
            backward = module.backward if kind is Kind.BACKWARD else module.backward_input
            gradient = backward(i, self._take(self._input(action)))
            if stage > 0:
                if gradient is None:
                    raise RuntimeError(f"stage {stage} gave its input no gradient")
                self._give(Action(Kind.BACKWARD, stage - 1, i), gradient)

    def _forward(self, action: Action) -> None:
        _, stage, i = action
        batch = self.microbatches[i]
        module = self.engine.stages[stage]
        x = batch.inputs.to(module.input_device) if stage == 0 else self._take(action)
        y = module.forward(i, x, batch.context)
        if stage < self.last:
            self._give(Action(Kind.FORWARD, stage + 1, i), y.detach())
            return
        loss, report = self.engine.objective(y, batch.targets.to(y.device), batch.context)
        self.reports.append(report.detach())
        if torch.is_grad_enabled():
            (gradient,) = torch.autograd.grad(loss, y)
            self.arrived[Action(Kind.BACKWARD, stage, i)] = gradient

    def receive(self, action: Action) -> None:
        """Post the receive of what an action needs from another rank, once, and of all that is sent before it."""
        needed = self._input(action)
        source = self._source(needed)
        if source is None:
            return
        waiting = self.expected[source, needed.kind]
        while needed in waiting:
            kind, stage, i = tensor = waiting.popleft()
            device = self.engine.stages[stage].input_device  # autograd moves a gradient where it is needed elsewhere
            buffer = torch.empty(self.microbatches[i].boundary, dtype=self.engine.dtype, device=device)
            group = self._group(kind)
            work = dist.irecv(buffer, dist.get_global_rank(group, source), group=group, tag=self._tag(tensor))
            self.receiving[tensor] = cast(dist.Work, work), buffer

    def finish(self) -> None:
        """Wait until everything sent has left; until then its memory must stay."""
        started = time.perf_counter()
        for work, _ in self.sending:
            work.wait()
        self.engine.waited += time.perf_counter() - started

    def _input(self, action: Action) -> Action:
        """The name of the tensor that an action takes in."""
        return action if action.kind is Kind.FORWARD else action._replace(kind=Kind.BACKWARD)

    def _output(self, action: Action) -> Action | None:
        """The name of the tensor that an action gives to another stage, if it does."""
        kind, stage, i = action
        step = {Kind.FORWARD: 1, Kind.WEIGHT: 0}.get(kind, -1)
        if step == 0 or not 0 <= stage + step <= self.last:
            return None
        return self._input(Action(kind, stage + step, i))

    def _source(self, tensor: Action) -> int | None:
        """The other rank that a tensor comes from, if it comes from one."""
        before = tensor.stage + (-1 if tensor.kind is Kind.FORWARD else 1)
        if not 0 <= before <= self.last:
            return None
        rank = self.schedule.placement[before]
        return None if rank == self.engine.rank else rank

    def _take(self, action: Action) -> Tensor:
        if action in self.arrived:
            return self.arrived.pop(action)
        work, buffer = self.receiving.pop(action)
        started = time.perf_counter()
        work.wait()
        self.engine.waited += time.perf_counter() - started
        return buffer

    def _give(self, action: Action, tensor: Tensor) -> None:
        """Hand a tensor to the rank of the action that needs it."""
        rank = self.schedule.placement[action.stage]
        if rank == self.engine.rank:
            self.arrived[action] = tensor.to(self.engine.stages[action.stage].input_device)
            return
        self.sending = [(work, kept) for work, kept in self.sending if not work.is_completed()]
        tensor = tensor.contiguous()
        group = self._group(action.kind)
        work = dist.isend(tensor, dist.get_global_rank(group, rank), group=group, tag=self._tag(action))
        self.sending.append((cast(dist.Work, work), tensor))

    def _group(self, kind: Kind) -> dist.ProcessGroup:
        group = self.engine.groups[kind]
        if group is None:
            raise ValueError("a pipeline over several ranks needs its process groups")
        return group

    def _tag(self, action: Action) -> int:
        return (action.microbatch * self.schedule.stages + action.stage) * 2 + (action.kind is Kind.BACKWARD)
