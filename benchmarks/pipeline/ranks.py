"""Time one forward and backward of a pipeline with this project's engine and with PyTorch's. Started by `run.py`.

Usage: mpirun -np N python -m benchmarks.pipeline.ranks MICROBATCHES

All contenders run the same layers, weights and micro-batches with the same stages and one thread per rank. Before the
timing starts, the gradient norms of all contenders are compared.
"""

import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import pipelining

import pipeline
from benchmarks.turns import serve
from fira.devices import keep_freed_memory
from fira.models.fira import FIRA, FiraConfig
from fira.nn.context import Context, TrainingContext
from pipeline.engine import Engine, MicroBatch
from pipeline.mesh import Layout, make_mesh
from pipeline.schedule import SCHEDULES
from pipeline.stage import DeviceLayers, Stage

CONFIG = FiraConfig(
    vocab_size=512, seq_len=128, d_model=192, n_head=4, num_layers=16, d_ff=384, num_experts=4, dropout=0.0
)
ROWS = 4  # sequences in a micro-batch
TORCH_SCHEDULES = {
    "gpipe": pipelining.ScheduleGPipe,
    "1f1b": pipelining.Schedule1F1B,
    "interleaved": pipelining.ScheduleInterleaved1F1B,
    "interleaved zero-bubble": pipelining.ScheduleInterleavedZeroBubble,
    "zb-v": pipelining.ScheduleZBVZeroBubble,
}
SAME_PLACEMENT = {"interleaved zero-bubble": "interleaved"}  # PyTorch's schedule → ours with the same placement
Run = Callable[[], None]


@dataclass
class BenchContext(Context):
    """A context with labels for the objective. Its `targets` remain None, so that the head returns logits."""

    labels: Tensor | None = None


def cross_entropy(logits: Tensor, labels: Tensor, weight: float) -> Tensor:
    """Return the weighted sum over tokens; computed from logits, as in PyTorch's and DeepSpeed's pipelines."""
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") * weight


def objective(logits: Tensor, context: BenchContext) -> tuple[Tensor, Tensor]:
    assert context.labels is not None
    loss = cross_entropy(logits, context.labels, context.training.loss_weight)
    return loss, loss


class Layers(nn.Module):
    """Consecutive layers with one argument, as PyTorch's pipelining calls them."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        context = Context.for_tokens(x, training=False)
        for layer in self.layers:
            x = layer(x, context)
        return x


class Bench:
    """The model and the micro-batches, and one function per contender that runs a forward and backward of them."""

    def __init__(self, rank: int, ranks: int, microbatches: int) -> None:
        self.rank = rank
        self.ranks = ranks
        self.count = microbatches
        self.model = FIRA(CONFIG)
        torch.manual_seed(5)
        self.tokens = torch.randint(CONFIG.vocab_size, (microbatches * ROWS, CONFIG.seq_len))
        self.targets = self.tokens.roll(-1, 1)
        self.weight = 1 / self.tokens.numel()

    def stages(self, schedule: str) -> list[nn.Sequential]:
        """Return the layers of all stages: equal numbers of blocks, embedding in the first and head in the last."""
        count = self.ranks * SCHEDULES[schedule].stages_per_rank
        edges = [1 + CONFIG.num_layers * s // count for s in range(count + 1)]
        edges[0], edges[-1] = 0, CONFIG.num_layers + 2
        return [self.model.layers[slice(*span)] for span in pairwise(edges)]

    def own_stages(self, schedule: str) -> dict[int, nn.Sequential]:
        """Return the layers of this rank's stages by stage."""
        placement = SCHEDULES[schedule].placement(self.ranks)
        return {s: layers for s, layers in enumerate(self.stages(schedule)) if placement[s] == self.rank}

    def microbatches(self) -> list[MicroBatch]:
        boundary = torch.Size((ROWS, CONFIG.seq_len, CONFIG.d_model))
        return [
            MicroBatch(x, boundary, BenchContext(training=TrainingContext(loss_weight=self.weight), labels=y))
            for x, y in zip(self.tokens.split(ROWS), self.targets.split(ROWS), strict=True)
        ]

    def ours(self, schedule: str) -> Run:
        stages = {
            s: Stage(DeviceLayers(layers), torch.device("cpu")) for s, layers in self.own_stages(schedule).items()
        }
        mesh = make_mesh(Layout(pp=self.ranks), SCHEDULES[schedule].placement(self.ranks))
        engine = Engine(stages, objective, self.rank, mesh.channels)
        actions = SCHEDULES[schedule].builder(self.ranks, self.count)
        return lambda: engine.run(actions, self.microbatches()) and None

    def torch(self, schedule: str, group: dist.ProcessGroup | None) -> Run:
        own = self.own_stages(SAME_PLACEMENT.get(schedule, schedule))
        total = self.ranks * SCHEDULES[SAME_PLACEMENT.get(schedule, schedule)].stages_per_rank
        stages = [
            pipelining.PipelineStage(Layers(layers), s, total, torch.device("cpu"), group=group)
            for s, layers in own.items()
        ]

        def loss(logits: Tensor, targets: Tensor) -> Tensor:
            return cross_entropy(logits, targets, self.weight)

        multi_stage = schedule not in ("gpipe", "1f1b")
        schedule_run: Any = TORCH_SCHEDULES[schedule](
            stages if multi_stage else stages[0], self.count, loss_fn=loss, scale_grads=False
        )  # type: ignore[arg-type]
        inputs = [self.tokens] if 0 in own else []
        labels = {"target": self.targets} if total - 1 in own else {}
        return lambda: schedule_run.step(*inputs, **labels)

    def without_communication(self) -> Run:
        """Return a run of this rank's stage of 1F1B without communication, a lower bound for every schedule."""
        ((number, layers),) = self.own_stages("1f1b").items()
        stage = Stage(DeviceLayers(layers), torch.device("cpu"))
        hidden = torch.randn(ROWS, CONFIG.seq_len, CONFIG.d_model)

        def run() -> None:
            for i, batch in enumerate(self.microbatches()):
                y = stage.forward(i, hidden if number else batch.inputs, batch.context)
                if number == self.ranks - 1:
                    (gradient,) = torch.autograd.grad(objective(y, batch.context)[0], y)
                else:
                    gradient = hidden
                stage.backward(i, gradient)

        return run

    def gradient_norm(self) -> float:
        """Return the norm of the gradients of all ranks, and set the gradients to None."""
        square = sum(p.grad.double().square().sum() for p in self.model.parameters() if p.grad is not None)
        total = torch.as_tensor(square, dtype=torch.float64)
        dist.all_reduce(total)
        self.model.zero_grad()
        return float(total.sqrt())


def zeroing_gradients(bench: Bench, run: Run) -> Run:
    """Return a run followed by zero_grad."""

    def call() -> None:
        run()
        bench.model.zero_grad()

    return call


def main(microbatches: int) -> None:
    warnings.simplefilter("ignore")
    world = pipeline.init(timeout_s=3600)  # a rank waits while other jobs are timed
    torch.set_num_threads(1)
    keep_freed_memory()
    bench = Bench(world.rank, world.size, microbatches)
    gloo = dist.new_group(backend="gloo")
    runs = {("alone", "stage"): bench.without_communication()}
    runs |= {("ours", name): bench.ours(name) for name in SCHEDULES}
    for engine, group in (("torch on ours", dist.new_group()), ("torch on gloo", gloo)):
        runs |= {(engine, name): bench.torch(name, group) for name in TORCH_SCHEDULES}  # type: ignore[arg-type]
    norms = {}
    for key, run in runs.items():
        run()
        norms[key] = bench.gradient_norm()
    expected = norms["ours", "1f1b"]
    wrong = [key for key, norm in norms.items() if key[0] != "alone" and abs(norm / expected - 1) > 1e-5]
    assert not wrong, f"gradient norms differ from that of our 1F1B: {wrong}"
    serve(
        {f"{engine}: {schedule}": zeroing_gradients(bench, run) for (engine, schedule), run in runs.items()}, world.rank
    )


if __name__ == "__main__":
    main(int(sys.argv[1]))
