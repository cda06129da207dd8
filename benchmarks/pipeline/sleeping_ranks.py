"""Time schedules with layers that sleep instead of computing. Started by `sleeping.py`.

Usage: mpirun -np N python -m benchmarks.pipeline.sleeping_ranks MICROBATCHES F I W

A rank sleeps F, I and W seconds for the forward of a micro-batch, its input gradient and its weight gradients, divided
by the stages per rank. Sleeping needs no core, so that the times do not depend on the number of cores or on other jobs.
"""

import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import pipeline
from benchmarks.turns import serve
from pipeline.engine import Engine, MicroBatch
from pipeline.mesh import Layout, make_mesh
from pipeline.schedule import SCHEDULES, ActionKind
from pipeline.stage import DeviceLayers, Stage

Seconds = dict[ActionKind, float]


class SleepingLayer(nn.Module):
    """y = x + weight, in which the forward and both gradients take fixed times."""

    def __init__(self, seconds: Seconds) -> None:
        super().__init__()
        self.seconds = seconds
        self.weight = nn.Parameter(torch.zeros(1, 1))

    def forward(self, x: Tensor, context: Any) -> Tensor:
        x = Sleep.apply(x, self.seconds[ActionKind.FORWARD], self.seconds[ActionKind.BACKWARD_INPUT])
        return x + Sleep.apply(self.weight, 0.0, self.seconds[ActionKind.BACKWARD_WEIGHT])


class Sleep(torch.autograd.Function):
    """Identity that takes fixed times."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: float, backward: float) -> Tensor:
        ctx.backward_seconds = backward
        time.sleep(forward)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        time.sleep(ctx.backward_seconds)
        return grad, None, None


def contender(name: str, rank: int, ranks: int, microbatches: int, seconds: Seconds) -> Callable[[], object]:
    spec = SCHEDULES[name]
    placement = spec.placement(ranks)
    per_layer = {kind: value / spec.stages_per_rank for kind, value in seconds.items()}
    layers = {s: DeviceLayers([SleepingLayer(per_layer)]) for s, r in enumerate(placement) if r == rank}
    stages = {s: Stage(layer, torch.device("cpu")) for s, layer in layers.items()}
    engine = Engine(stages, lambda y, _: (y.sum(), y.sum()), rank, make_mesh(Layout(pp=ranks), placement).channels)
    x = torch.ones(1, 1)
    run = partial(engine.run, spec.builder(ranks, microbatches), [MicroBatch(x, x.shape)] * microbatches)
    run()
    for layer in layers.values():  # a weight is added to the output of every micro-batch
        assert all(p.grad is not None and float(p.grad) == microbatches for p in layer.parameters())
    return run


def main(microbatches: int, forward: float, backward_input: float, backward_weight: float) -> None:
    world = pipeline.init(timeout_s=3600)
    torch.set_num_threads(1)
    kinds = (ActionKind.FORWARD, ActionKind.BACKWARD_INPUT, ActionKind.BACKWARD_WEIGHT)
    seconds = dict(zip(kinds, (forward, backward_input, backward_weight), strict=True))
    serve({name: contender(name, world.rank, world.size, microbatches, seconds) for name in SCHEDULES}, world.rank)


if __name__ == "__main__":
    main(int(sys.argv[1]), *map(float, sys.argv[2:]))
