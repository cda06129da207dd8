"""One training step of a small model on random tokens. As a program, on one rank: `python -m fira.doctor.one_step`."""

import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from fira.data.random_tokens import RandomTokens
from fira.models.registry import PRESETS, build
from fira.optim.settings import OptimizerSettings
from fira.parallel.batch_split import BatchSplit
from fira.parallel.parallelize import parallelize
from fira.training.trainer import Trainer
from pipeline.mesh import Layout, make_mesh
from pipeline.mpi import init
from pipeline.schedule import SCHEDULES

PRESET, SEQ_LEN = "fira-tiny", 32
SEED = 5


@dataclass(frozen=True)
class StepNumbers:
    """Results of a step. seconds: of the step, which is the first one of its layout."""

    loss: float
    grad_norm: float
    seconds: float


def make_trainer(
    config: Any,
    layout: Layout,
    schedule: str,
    device: torch.device,
    microbatch: int = 1,
    autocast: torch.dtype | None = None,
    shard: str | None = None,
    recompute: int = 0,
    optimizer: str = "adamw",
) -> Trainer:
    """This rank's trainer of a new model in a layout (collective)."""
    mesh = make_mesh(layout, SCHEDULES[schedule].placement(layout.pp), [device])
    with torch.device("meta"):
        model = build(config)
    distributed = parallelize(
        model, mesh, SEED, [device], schedule, autocast=autocast, recompute=recompute, shard=shard
    )
    split = BatchSplit(microbatch, layout.dp, mesh.dp_rank, config.d_model, device)
    settings = OptimizerSettings(optimizer)
    return Trainer(distributed, mesh, split, schedule, settings, 1.0, fp16=autocast is torch.float16)


def one_step(layout: Layout, schedule: str, device: torch.device, sequences: int) -> StepNumbers:
    """Train one step of a new model in fp32 (collective). The numbers are equal on all ranks."""
    config = replace(PRESETS[PRESET], seq_len=SEQ_LEN)
    trainer = make_trainer(config, layout, schedule, device)
    started = time.perf_counter()
    result = trainer.step(RandomTokens(config.vocab_size, SEQ_LEN), sequences, lr=1e-3, seed=SEED)
    return StepNumbers(result.loss, result.grad_norm, time.perf_counter() - started)


def main(device: str, threads: str, sequences: str) -> None:
    init()
    torch.set_num_threads(int(threads))  # results on a CPU depend on the number of threads
    numbers = one_step(Layout(), "1f1b", torch.device(device), int(sequences))
    print(json.dumps(asdict(numbers)))


if __name__ == "__main__":
    main(*sys.argv[1:])
