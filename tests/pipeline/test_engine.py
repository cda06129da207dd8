"""The engine compared with plain autograd, on one rank and on several ranks that are threads of this process."""

import threading
import weakref
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pipeline.engine
from pipeline.engine import LOOK_AHEAD, Engine, MicroBatch
from pipeline.messages import Direction
from pipeline.mpi.activity import activity_of
from pipeline.schedule import SCHEDULES, Action, ActionKind, Schedule, forward_only
from pipeline.stage import DeviceLayers, Stage
from tests.pipeline.stand_ins import ManualClock, Network, Work, groups_of
from tests.pipeline.toy_layers import CPU, LAYERS, MICROBATCHES, make, objective, reference, take_gradients


def run_ranks(
    schedule: Schedule,
    layers: list[Any],
    batches: list[MicroBatch],
    recompute: bool = False,
    message_dtype: torch.dtype | None = None,
) -> tuple[list[float], Network]:
    """Run a schedule with every rank in a thread; return the reported losses and the network with its record."""
    network = Network()
    edges = [s * LAYERS // schedule.stages for s in range(schedule.stages + 1)]
    parts = [layers[a:b] for a, b in pairwise(edges)]
    reports: list[list[Tensor]] = [[] for _ in schedule.actions]
    errors: list[BaseException] = []

    def rank_main(rank: int) -> None:
        stages = {
            s: Stage(DeviceLayers(parts[s], recompute=recompute), CPU)
            for s, r in enumerate(schedule.placement)
            if r == rank
        }
        engine = Engine(stages, objective, rank, groups_of(schedule.placement, rank), message_dtype=message_dtype)
        try:
            reports[rank] = engine.run(schedule, batches)
            assert not any(stage._saved or stage._weight_backwards for stage in stages.values())
        except BaseException as error:
            errors.append(error)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.engine, "dist", network.dist())
        threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in range(len(schedule.actions))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors, errors
    last = schedule.placement[-1]
    assert all(not report for rank, report in enumerate(reports) if rank != last)
    return [float(report) for report in reports[last]], network


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_schedule_is_bitwise_identical_to_plain_autograd(name, ranks):
    layers, batches = make()
    losses, gradients = reference(layers, batches)
    schedule = SCHEDULES[name].builder(ranks, MICROBATCHES)
    reports, network = run_ranks(schedule, layers, batches)
    assert reports == losses
    assert all(torch.equal(a, b) for a, b in zip(take_gradients(layers), gradients, strict=True))
    crossing = sum(a != b for a, b in pairwise(schedule.placement))
    for tags in (network.tags[Direction.FORWARD], network.tags[Direction.BACKWARD]):
        assert len(set(tags)) == len(tags) == crossing * MICROBATCHES
    assert not set(network.tags[Direction.FORWARD]) & set(network.tags[Direction.BACKWARD])


def test_tags():
    """A tag is (micro-batch · stages + receiving stage) · 2 + direction."""
    layers, batches = make()
    _, network = run_ranks(SCHEDULES["gpipe"].builder(2, MICROBATCHES), layers, batches)
    assert network.tags[Direction.FORWARD] == [(i * 2 + 1) * 2 for i in range(MICROBATCHES)]
    assert network.tags[Direction.BACKWARD] == [i * 2 * 2 + 1 for i in range(MICROBATCHES)]


@pytest.mark.parametrize("placement", [(0, 1, 2), (0, 1, 1, 0), (0, 1, 0, 1)])
def test_evaluation_on_several_ranks_leaves_no_gradient(placement):
    layers, batches = make()
    losses, _ = reference(layers, batches)
    reports, network = run_ranks(forward_only(placement, MICROBATCHES), layers, batches)
    assert reports == losses
    assert not network.tags[Direction.BACKWARD]
    assert all(p.grad is None for layer in layers for p in layer.parameters())


@pytest.mark.parametrize(
    ("schedule", "enabled"),
    [(forward_only((0,), MICROBATCHES), False), (SCHEDULES["1f1b"].builder(1, MICROBATCHES), True)],
)
def test_evaluation_records_no_graph(schedule, enabled):
    layers, batches = make()
    modes = []
    stage = Stage(DeviceLayers(layers), CPU)
    Engine({0: stage}, lambda *args: (modes.append(torch.is_grad_enabled()), objective(*args))[1]).run(
        schedule, batches
    )
    assert modes == [enabled] * MICROBATCHES


def test_receives_of_the_next_actions_are_posted_before_an_action():
    """Rank 1 of GPipe posts the receives of LOOK_AHEAD forwards before the first one, then one more before each."""
    layers, batches = make()
    record: list[str] = []
    network = Network()
    stage = Stage(DeviceLayers(layers), CPU)
    forward = stage.forward
    stage.forward = lambda i, x, context: (record.append(f"F{i}"), forward(i, x, context))[1]  # type: ignore[method-assign]
    network.irecv = lambda buffer, *_, **options: (record.append(f"R{options['tag'] // 4}"), Work(lambda: None))[1]  # type: ignore[method-assign, assignment]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.engine, "dist", network.dist())
        Engine({1: stage}, objective, 1, groups_of((0, 1), 1)).run(SCHEDULES["gpipe"].builder(2, MICROBATCHES), batches)
    assert LOOK_AHEAD == 3
    assert record == ["R0", "R1", "R2", "F0", "R3", "F1", "R4", "F2", "F3", "F4"]


def all_on_one_rank(stages: int, split: bool) -> Schedule:
    """All forwards, then all backwards, then the weight gradients if backwards are split."""
    kind = ActionKind.BACKWARD_INPUT if split else ActionKind.BACKWARD
    actions = [Action(ActionKind.FORWARD, s, i) for i in range(MICROBATCHES) for s in range(stages)]
    actions += [Action(kind, s, i) for i in range(MICROBATCHES) for s in reversed(range(stages))]
    if split:
        actions += [Action(ActionKind.BACKWARD_WEIGHT, s, i) for s in range(stages) for i in range(MICROBATCHES)]
    return Schedule("one rank", MICROBATCHES, (0,) * stages, (tuple(actions),))


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("stages", [1, 2, 6])
def test_one_rank_is_bitwise_identical_to_plain_autograd(stages, recompute, split):
    """One rank needs no process groups. All micro-batches are in flight."""
    layers, batches = make()
    losses, gradients = reference(layers, batches)
    edges = [s * LAYERS // stages for s in range(stages + 1)]
    modules = [DeviceLayers(layers[a:b], recompute=recompute) for a, b in pairwise(edges)]
    clock = ManualClock()
    engine = Engine(
        {s: Stage(module, CPU) for s, module in enumerate(modules)},
        lambda output, context: (clock.sleep(1), objective(output, context))[1],
    )
    engine.clock = clock
    assert [float(report) for report in engine.run(all_on_one_rank(stages, split), batches)] == losses
    assert all(torch.equal(a, b) for a, b in zip(take_gradients(layers), gradients, strict=True))
    assert clock.now == MICROBATCHES
    assert engine.waited() == 0


def test_trace_and_waiting_time():
    """The start of an action excludes the wait for its message; the wait is counted in `waited`.

    A receive takes 1 s, a forward pass 10 s and a send 100 s.
    """
    layers, batches = make()
    network, clock, stage = Network(), ManualClock(), Stage(DeviceLayers(layers), CPU)
    network.irecv = lambda buffer, *_, **__: (buffer.zero_(), Work(lambda: clock.sleep(1)))[1]  # type: ignore[method-assign, assignment]
    network.isend = lambda *_, **__: Work(lambda: clock.sleep(100))  # type: ignore[method-assign, assignment]
    forward = stage.forward
    stage.forward = lambda *args: (clock.sleep(10), forward(*args))[1]  # type: ignore[method-assign]
    schedule = SCHEDULES["1f1b"].builder(2, MICROBATCHES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.engine, "dist", network.dist())
        engine = Engine({1: stage}, objective, 1, groups_of((0, 1), 1))
        engine.clock = clock
        engine.run(schedule, batches)
        engine.start_trace()
        engine.run(schedule, batches)
    assert engine.waited() == (1 + 100) * MICROBATCHES
    expected = []
    for i in range(MICROBATCHES):
        end = (1 + 10) * (i + 1)
        expected += [(Action(ActionKind.FORWARD, 1, i), end - 10, end), (Action(ActionKind.BACKWARD, 1, i), end, end)]
    assert engine.stop_trace() == expected
    assert engine.stop_trace() == []


def test_completed_sends_are_released():
    """Before each send the tensors of completed sends are dropped; at the end the run waits for the remaining sends."""
    layers, batches = make()
    network, waited = Network(), []
    numbers = iter(range(MICROBATCHES))

    def isend(*_: Any, **__: Any) -> Work:
        number = next(numbers)
        work = Work(lambda: waited.append(number))
        work.is_completed = lambda: number % 2 == 0
        return work

    network.isend = isend  # type: ignore[method-assign, assignment]
    network.irecv = lambda buffer, *_, **__: (buffer.zero_(), Work(lambda: None))[1]  # type: ignore[method-assign, assignment]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.engine, "dist", network.dist())
        engine = Engine({1: Stage(DeviceLayers(layers), CPU)}, objective, 1, groups_of((0, 1), 1))
        engine.run(SCHEDULES["1f1b"].builder(2, MICROBATCHES), batches)
    assert waited == [1, 3, 4]


def test_buffers_are_kept_until_their_messages_are_complete():
    """A device may still read what is sent and write what is received after the call has returned."""
    layers, batches = make()
    network, running = Network(), set()

    def start(tensor: Tensor) -> Work:
        assert all(buffer() is not None for buffer in running), "a buffer was freed too early"
        buffer = weakref.ref(tensor)
        running.add(buffer)
        return Work(lambda: (buffer(), running.remove(buffer))[0])

    network.isend = lambda tensor, *_, **__: start(tensor)  # type: ignore[method-assign, assignment]
    network.irecv = lambda buffer, *_, **__: start(buffer.zero_())  # type: ignore[method-assign, assignment]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.engine, "dist", network.dist())
        for rank in range(2):
            engine = Engine({rank: Stage(DeviceLayers(layers), CPU)}, objective, rank, groups_of((0, 1), rank))
            engine.run(SCHEDULES["1f1b"].builder(2, MICROBATCHES), batches)
    assert running == set()


@pytest.mark.parametrize("number", [4, 6])
def test_wrong_number_of_microbatches_raises(number):
    layers, batches = make()
    engine = Engine({0: Stage(DeviceLayers(layers), CPU)}, objective)
    with pytest.raises(ValueError, match=f"the schedule is for 5 micro-batches, not {number}"):
        engine.run(all_on_one_rank(1, False), [*batches, *batches][:number])


def test_missing_process_group_raises():
    layers, batches = make()
    engine = Engine({0: Stage(DeviceLayers(layers), CPU)}, objective)
    with pytest.raises(ValueError, match="no process group for the channel backward 1 → 0"):
        engine.run(SCHEDULES["1f1b"].builder(2, MICROBATCHES), batches)


def test_input_without_gradient_raises_and_the_stages_are_cleared():
    class Integers(nn.Module):
        def forward(self, x: Tensor, context: Any) -> Tensor:
            return x.long()

    class Embed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor, context: Any) -> Tensor:
            return x * self.scale

    _, batches = make()
    stages = {s: Stage(DeviceLayers([module]), CPU) for s, module in enumerate([Integers(), Embed()])}
    with pytest.raises(RuntimeError, match="stage 1 returned no gradient for its input"):
        Engine(stages, objective).run(all_on_one_rank(2, False), batches)
    assert not any(stage._saved for stage in stages.values())


def test_inputs_are_copied_to_the_device_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, copies = torch.randn(2, 3), []
    to = Tensor.to

    def recorded(x: Tensor, *args: Any, **options: Any) -> Tensor:
        if x is inputs:
            copies.append(options)
        return to(x, *args, **options)

    monkeypatch.setattr(Tensor, "to", recorded)
    engine = Engine({0: Stage(DeviceLayers([]), CPU)}, lambda y, context: (y.sum(), y.sum()))
    engine.run(forward_only((0,), 1), [MicroBatch(inputs, inputs.shape)])
    assert copies == [{"non_blocking": True}]


def test_messages_are_sent_in_their_dtype_and_stages_take_theirs():
    """bf16 messages halve the traffic; the layers behind a boundary still compute in the engine's dtype."""
    layers, batches = make()
    losses, _ = reference(layers, batches)
    reports, network = run_ranks(
        SCHEDULES["1f1b"].builder(2, MICROBATCHES), layers, batches, message_dtype=torch.bfloat16
    )
    sent = [tensor for messages in network.sent.values() for _, tensor in messages]
    assert len(sent) == 2 * MICROBATCHES
    assert {tensor.dtype for tensor in sent} == {torch.bfloat16}
    assert reports != losses
    np.testing.assert_allclose(reports, losses, rtol=0.02)


class Passing(nn.Module):
    def forward(self, x: Tensor, context: Any) -> Tensor:
        return x


class Failing(nn.Module):
    """A layer that raises in its second call."""

    calls = 0

    def forward(self, x: Tensor, context: Any) -> Tensor:
        self.calls += 1
        if self.calls == 2:
            raise RuntimeError("injected")
        return x


def test_error_in_a_layer_names_stage_micro_batch_and_layer():
    stage = Stage(DeviceLayers([Passing(), Failing()], first=4), CPU)
    engine = Engine({0: stage}, lambda y, context: (y.sum(), y.sum()))
    microbatches = [MicroBatch(torch.zeros(1), torch.Size([1])) for _ in range(3)]
    with pytest.raises(RuntimeError, match="injected") as caught:
        engine.run(forward_only((0,), 3), microbatches)
    assert activity_of(caught.value) == "forward of stage 0, micro-batch 1, layer 5"
