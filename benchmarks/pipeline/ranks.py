"""Time one forward and backward of a pipeline: our engine's schedules and PyTorch's. Started by `run.py`.

Usage: mpirun -np N python -m benchmarks.pipeline.ranks MICROBATCHES

All contenders run the same layers, weights and micro-batches, cut at the same places, one thread a rank, and must give
the same gradients before they wait for their turns.
"""

import sys
import warnings
from collections.abc import Callable
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
from pipeline.schedule import SCHEDULES
from pipeline.stage import DeviceLayers, Stage

CONFIG = FiraConfig(
    vocab_size=512, seq_len=128, d_model=192, n_head=4, num_layers=16, d_ff=384, num_experts=4, dropout=0.0
)
ROWS = 4  # sequences in a micro-batch
THEIRS = {  # PyTorch's schedules, and which of ours has their stages where they have them
    "gpipe": pipelining.ScheduleGPipe,
    "1f1b": pipelining.Schedule1F1B,
    "interleaved": pipelining.ScheduleInterleaved1F1B,
    "interleaved zero-bubble": pipelining.ScheduleInterleavedZeroBubble,
    "zb-v": pipelining.ScheduleZBVZeroBubble,
}
PLACED_AS = {"interleaved zero-bubble": "interleaved"}
Run = Callable[[], None]


def objective(logits: Tensor, targets: Tensor, context: Context) -> tuple[Tensor, Tensor]:
    """Cross-entropy of logits, which all contenders can take: here the head does not compare."""
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") * context.training.loss_weight
    return loss, loss


class Layers(nn.Module):
    """Consecutive layers as PyTorch's pipelining calls them: without a context."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        context = Context.for_tokens(x, training=False)
        for layer in self.layers:
            x = layer(x, context)
        return x


class Bench:
    """The work, and each contender's way of doing it."""

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
        """All stages' layers: blocks in equal parts, the embedding before and the head behind them."""
        count = self.ranks * SCHEDULES[schedule].stages_per_rank
        edges = [1 + CONFIG.num_layers * s // count for s in range(count + 1)]
        edges[0], edges[-1] = 0, CONFIG.num_layers + 2
        return [self.model.layers[slice(*span)] for span in pairwise(edges)]

    def cut(self, schedule: str) -> dict[int, nn.Sequential]:
        """The layers of this rank's stages."""
        placement = SCHEDULES[schedule].placement(self.ranks)
        return {s: layers for s, layers in enumerate(self.stages(schedule)) if placement[s] == self.rank}

    def microbatches(self) -> list[MicroBatch]:
        boundary = torch.Size((ROWS, CONFIG.seq_len, CONFIG.d_model))
        return [
            MicroBatch(x, y, boundary, Context(training=TrainingContext(loss_weight=self.weight)))
            for x, y in zip(self.tokens.split(ROWS), self.targets.split(ROWS), strict=True)
        ]

    def ours(self, schedule: str, groups: list[dist.ProcessGroup]) -> Run:
        stages = {s: Stage(DeviceLayers(layers), torch.device("cpu")) for s, layers in self.cut(schedule).items()}
        engine = Engine(stages, objective, *groups)
        actions = SCHEDULES[schedule].builder(self.ranks, self.count)
        return lambda: engine.run(actions, self.microbatches()) and None

    def theirs(self, schedule: str, group: dist.ProcessGroup | None) -> Run:
        parts = self.cut(PLACED_AS.get(schedule, schedule))
        total = self.ranks * SCHEDULES[PLACED_AS.get(schedule, schedule)].stages_per_rank
        stages = [
            pipelining.PipelineStage(Layers(part), s, total, torch.device("cpu"), group=group)
            for s, part in parts.items()
        ]

        def loss(logits: Tensor, targets: Tensor) -> Tensor:
            return objective(logits, targets, Context(training=TrainingContext(loss_weight=self.weight)))[0]

        several = schedule not in ("gpipe", "1f1b")
        player: Any = THEIRS[schedule](stages if several else stages[0], self.count, loss_fn=loss, scale_grads=False)  # type: ignore[arg-type]
        inputs = [self.tokens] if 0 in parts else []
        labels = {"target": self.targets} if total - 1 in parts else {}
        return lambda: player.step(*inputs, **labels)

    def alone(self) -> Run:
        """This rank's stage of 1F1B for all micro-batches, without a word to other ranks: what no schedule can beat."""
        ((number, layers),) = self.cut("1f1b").items()
        stage = Stage(DeviceLayers(layers), torch.device("cpu"))
        hidden = torch.randn(ROWS, CONFIG.seq_len, CONFIG.d_model)

        def run() -> None:
            for i, batch in enumerate(self.microbatches()):
                y = stage.forward(i, hidden if number else batch.inputs, batch.context)
                if number == self.ranks - 1:
                    (gradient,) = torch.autograd.grad(objective(y, batch.targets, batch.context)[0], y)
                else:
                    gradient = hidden
                stage.backward(i, gradient)

        return run

    def gradient_norm(self) -> float:
        """Of all ranks' gradients, which are then forgotten."""
        square = sum(p.grad.double().square().sum() for p in self.model.parameters() if p.grad is not None)
        total = torch.as_tensor(square, dtype=torch.float64)
        dist.all_reduce(total)
        self.model.zero_grad()
        return float(total.sqrt())


def forgotten(bench: Bench, run: Run) -> Run:
    """A run whose gradients are not kept."""

    def call() -> None:
        run()
        bench.model.zero_grad()

    return call


def main(microbatches: int) -> None:
    warnings.simplefilter("ignore")
    world = pipeline.init(timeout_s=3600)  # others take their turns
    torch.set_num_threads(1)
    keep_freed_memory()
    bench = Bench(world.rank, world.size, microbatches)
    gloo = dist.new_group(backend="gloo")
    groups = [dist.new_group(), dist.new_group()]
    runs = {("alone", "stage"): bench.alone()}
    runs |= {("ours", name): bench.ours(name, groups) for name in SCHEDULES}  # type: ignore[arg-type]
    for who, group in (("torch on ours", groups[0]), ("torch on gloo", gloo)):
        runs |= {(who, name): bench.theirs(name, group) for name in THEIRS}  # type: ignore[arg-type]
    norms = {}
    for key, run in runs.items():
        run()
        norms[key] = bench.gradient_norm()
    expected = norms["ours", "1f1b"]
    wrong = [key for key, norm in norms.items() if key[0] != "alone" and abs(norm / expected - 1) > 1e-5]
    assert not wrong, f"these do not give the same gradients: {wrong}"
    serve({f"{who}: {schedule}": forgotten(bench, run) for (who, schedule), run in runs.items()}, world.rank)


if __name__ == "__main__":
    main(int(sys.argv[1]))
