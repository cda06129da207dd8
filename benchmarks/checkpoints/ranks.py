"""Training steps with and without checkpoints, for one number of ranks. Started by run.py under mpirun."""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

import pipeline
from benchmarks.training.ranks import CONFIG
from benchmarks.turns import serve
from fira.checkpoint.writer import CheckpointWriter
from fira.data.random_tokens import RandomTokens
from fira.devices import keep_freed_memory
from fira.doctor.one_step import make_trainer
from fira.models.registry import PRESETS, RECIPES
from fira.training import state
from pipeline.mesh import CPU, Layout

STEPS = 10  # of a call
MODELS = {"fira-tiny": (PRESETS["fira-tiny"], RECIPES["fira-tiny"].batch_size), "30M": (CONFIG, 8)}
LAYOUTS = {1: Layout(1, 1, 1), 2: Layout(2, 1, 1), 4: Layout(2, 2, 2)}
Run = Callable[[], None]


def contenders(name: str, ranks: int, folder: Path) -> dict[str, Run]:
    """Return calls of STEPS steps that save never, every 10 steps, every step, and every 10 steps in the foreground.

    The first save of a call is in its first step, and the last one is complete at its end.
    """
    config, batch = MODELS[name]
    microbatch = max(1, batch // LAYOUTS[ranks].dp // (4 if LAYOUTS[ranks].pp > 1 else 1))
    trainer = make_trainer(config, LAYOUTS[ranks], "1f1b", CPU, microbatch)
    loader = RandomTokens(config.vocab_size, config.seq_len)
    writer = CheckpointWriter(folder / name, keep=2)
    saved = 0

    def run(every: int | None, wait: bool = False) -> None:
        nonlocal saved
        for step in range(STEPS):
            result = trainer.step(loader, batch, 1e-4, 0, [writer.finished()])
            writer.advance(result.extra[0])
            if every and step % every == 0:
                saved += 1
                state.save(writer, saved, trainer, loader, None, settings={})
                if wait:
                    writer.finish()
        writer.finish()

    return {
        f"{name}, never": lambda: run(None),
        f"{name}, every 10 steps": lambda: run(10),
        f"{name}, every step": lambda: run(1),
        f"{name}, every 10 steps, waited for": lambda: run(10, wait=True),
    }


def main() -> None:
    world = pipeline.init(timeout_s=3600)  # a rank waits while other jobs are timed
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as own:
        folder = [own]
        dist.broadcast_object_list(folder)
        runs: dict[str, Run] = {}
        for name in sys.argv[1:]:
            runs |= contenders(name, world.size, Path(folder[0]))
        for run in runs.values():
            run()
        serve(runs, world.rank)


if __name__ == "__main__":
    main()
