"""Training under autocast with weights that are cast once per step, and by plain autocast, on each rank of a test."""

import hashlib
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from fira.data.loader import Loader, ValidationSequences
from fira.data.text_windows import TextWindows
from fira.models.registry import from_document
from fira.optim.settings import OptimizerSettings
from fira.parallel.batch_split import BatchSplit
from fira.parallel.gradients import gradient_of
from fira.parallel.parallelize import parallelize
from fira.training import trainer as module
from fira.training.trainer import Trainer
from pipeline.mesh import CPU, Layout, make_mesh
from pipeline.schedule import SCHEDULES
from tests.ranks.parity_ranks import Tokens, meta_model

SEQUENCES = 4


def train(
    model: dict[str, Any],
    layout: list[int],
    autocast: str,
    schedule: str = "1f1b",
    devices: int = 1,
    recompute: int = 0,
    microbatch: int = 1,
    steps: int = 2,
    shard: str | None = None,
) -> dict[str, Any]:
    """Train a model, with a validation after each step. Numbers are returned as text, in which NaN is equal to NaN."""
    torch.set_num_threads(1)
    config, dtype, local_devices = from_document(model), getattr(torch, autocast), [CPU] * devices
    mesh = make_mesh(Layout(*layout), SCHEDULES[schedule].placement(layout[0]), local_devices)
    built = parallelize(
        meta_model(config), mesh, 7, local_devices, schedule, autocast=dtype, recompute=recompute, shard=shard
    )
    split = BatchSplit(microbatch, mesh.layout.dp, mesh.dp_rank, config.d_model)
    trainer = Trainer(built, mesh, split, schedule, OptimizerSettings(), clip=1.0, fp16=dtype is torch.float16)
    loader = Loader(TextWindows(Tokens(config.vocab_size), config.seq_len), seed=3)  # type: ignore[arg-type]
    unseen = ValidationSequences(TextWindows(Tokens(config.vocab_size, 60), config.seq_len, complete=False))  # type: ignore[arg-type]
    numbers, skipped = [], []
    for _ in range(steps):
        result = trainer.step(loader, SEQUENCES, 1e-2, seed=11)
        numbers += [result.loss, result.aux_loss, result.grad_norm, trainer.forward.mean(unseen, 3).loss]
        skipped.append(result.skipped)
    kept = [part for part in built.shards if part.kept]
    return {
        "numbers": [number.hex() for number in numbers],
        "skipped": skipped,
        "weights": {part.name: _digest(part.parameter) for part in kept},
        "gradients": {part.name: _digest(gradient_of(part)) for part in kept},
    }


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()


def compare(cases: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The results of each case: with weights cast once per step, and by plain autocast."""
    results = []
    for case in cases:
        with patch.object(module, "cast_weights", lambda *_: nullcontext()):
            plain = train(**case)
        results.append([train(**case), plain])
    return results


def compare_all(cases: dict[str, list[dict[str, Any]]]) -> dict[str, list[list[dict[str, Any]]]]:
    """Run several comparisons in one job, because starting ranks takes longer than training."""
    return {name: compare(trainings) for name, trainings in cases.items()}
