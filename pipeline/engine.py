"""The engine interprets a schedule's actions on one rank: receive, compute, send. One stage is its simplest case."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.schedule import Action, Kind, Schedule
from pipeline.stage import Stage


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

    def run(self, schedule: Schedule, microbatches: Sequence[MicroBatch]) -> list[Tensor]:
        """Play this rank's actions. Gradients are added to the parameters' `.grad`.

        Returns the reported scalar of each micro-batch where this rank holds the last stage, else an empty list.
        """
        if len(microbatches) != schedule.microbatches:
            raise ValueError(f"the schedule is for {schedule.microbatches} micro-batches, not {len(microbatches)}")
        actions = schedule.actions[self.rank]
        training = any(action.kind is Kind.BACKWARD for action in actions)
        play = _Play(self, schedule, microbatches)
        self.waited = 0.0
        try:
            with torch.set_grad_enabled(training):
                for action, following in zip(actions, [*actions[1:], None], strict=True):
                    play.receive(action)
                    if following is not None:
                        play.receive(following)  # posted early, so that it arrives while this action computes
                    (play.forward if action.kind is Kind.FORWARD else play.backward)(action)
                play.finish()
        finally:
            for stage in self.stages.values():
                stage.clear()
        return play.reports


class _Play:
    """One run: what was received, what is under way, what the last stage reported."""

    def __init__(self, engine: Engine, schedule: Schedule, microbatches: Sequence[MicroBatch]) -> None:
        self.engine = engine
        self.schedule = schedule
        self.microbatches = microbatches
        self.last = schedule.stages - 1
        self.arrived: dict[Action, Tensor] = {}
        self.receiving: dict[Action, tuple[dist.Work, Tensor]] = {}
        self.sending: list[tuple[dist.Work, Tensor]] = []
        self.reports: list[Tensor] = []

    def forward(self, action: Action) -> None:
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

    def backward(self, action: Action) -> None:
        _, stage, i = action
        gradient = self.engine.stages[stage].backward(i, self._take(action))
        if stage > 0:
            if gradient is None:
                raise RuntimeError(f"stage {stage} gave its input no gradient")
            self._give(Action(Kind.BACKWARD, stage - 1, i), gradient)

    def receive(self, action: Action) -> None:
        """Post the receive of what an action needs from another rank, once."""
        source = self._source(action)
        if source is None or action in self.receiving or action in self.arrived:
            return
        kind, stage, i = action
        device = self.engine.stages[stage].input_device  # a gradient is moved by autograd where it is needed elsewhere
        buffer = torch.empty(self.microbatches[i].boundary, dtype=self.engine.dtype, device=device)
        group = self._group(kind)
        work = dist.irecv(buffer, dist.get_global_rank(group, source), group=group, tag=self._tag(action))
        self.receiving[action] = cast(dist.Work, work), buffer

    def finish(self) -> None:
        """Wait until everything sent has left; until then its memory must stay."""
        started = time.perf_counter()
        for work, _ in self.sending:
            work.wait()
        self.engine.waited += time.perf_counter() - started

    def _source(self, action: Action) -> int | None:
        """The other rank that an action's input comes from, if it comes from one."""
        kind, stage, _ = action
        before = stage - 1 if kind is Kind.FORWARD else stage + 1
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
