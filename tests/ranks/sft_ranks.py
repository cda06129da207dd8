"""Steps of supervised fine-tuning on packed chats, run on each rank of a test."""

import logging
from pathlib import Path
from typing import Any

import torch

from fira.checkpoint.pretrained import open_saved
from fira.data.loader import Loader
from fira.models.registry import from_document
from fira.optim.settings import OptimizerSettings
from fira.parallel.batch_split import BatchSplit
from fira.parallel.gradients import gradient_of
from fira.parallel.parallelize import parallelize
from fira.posttraining.packed_examples import PackedExamples
from fira.training.config import TrainConfig
from fira.training.setup import set_up
from fira.training.state import load_weights
from fira.training.trainer import Trainer
from pipeline import init
from pipeline.mesh import CPU, Layout, make_mesh
from pipeline.schedule import SCHEDULES
from tests.ranks.parity_ranks import meta_model

SEED = 3  # of the order of the sequences


def train(
    model: dict[str, Any],
    layout: list[int],
    folder: str,
    microbatch: int,
    batch: int,
    steps: int = 1,
    dtype: str = "float64",
    schedule: str = "1f1b",
    weights: str | None = None,
) -> dict[str, Any]:
    """Compute steps at the learning rate zero, so that all of them have the initial weights.

    model: the document of a config. folder: of the packed chats. weights: a model to load.
    Returns loss, auxiliary loss and gradient norm of each step, and this rank's rows of the initial weights and of the
    gradients of each step, by name: (first row, values).
    """
    torch.set_num_threads(1)
    config, kind = from_document(model), getattr(torch, dtype)
    mesh = make_mesh(Layout(*layout), SCHEDULES[schedule].placement(layout[0]), [CPU])
    built = parallelize(meta_model(config), mesh, 7, [CPU], schedule, kind)
    if weights:
        load_weights(open_saved(weights), built)
    split = BatchSplit(microbatch, mesh.layout.dp, mesh.dp_rank, config.d_model, dtype=kind)
    trainer = Trainer(built, mesh, split, schedule, OptimizerSettings(), clip=0.0, fp16=False)
    loader: Any = Loader(PackedExamples(Path(folder), "train-0", config.seq_len), SEED)
    initial = {shard.name: (shard.start, shard.parameter.tolist()) for shard in built.shards}
    results, gradients = [], []
    for _ in range(steps):
        result = trainer.step(loader, batch, lr=0.0, seed=11)
        results.append([result.loss, result.aux_loss, result.grad_norm])
        gradients.append({shard.name: (shard.start, gradient_of(shard).tolist()) for shard in built.shards})
    return {"steps": results, "gradients": gradients, "initial": initial}


def train_all(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Run several trainings in one job, because starting ranks takes longer than training."""
    return [train(**case) for case in cases]


def start(settings: dict[str, Any]) -> dict[str, Any]:
    """Set up the run of `train.py` with these settings, and compute its first loss.

    Returns the lines of the log; the model's vocabulary; this rank's rows of the weights by name: (first row, values);
    the documents of the first batch, (tokens, targets); and the loss.
    """
    torch.set_num_threads(1)
    log = Log()
    logging.getLogger("fira").addHandler(log)
    logging.getLogger("fira").setLevel(logging.INFO)
    run = set_up(TrainConfig(**settings), [CPU], init(), quiet=True)
    logging.getLogger("fira").removeHandler(log)
    model, batch = run.trainer.model, run.config.recipe().batch_size
    weights = {shard.name: (shard.start, shard.parameter.tolist()) for shard in model.shards}
    rows = run.loader.batch(0, batch)
    documents = [
        (tokens[numbers == number].tolist(), targets[numbers == number].tolist())
        for tokens, targets, numbers in zip(rows.tokens, rows.targets, rows.documents, strict=True)
        for number in range(numbers.max() + 1)
    ]
    loss = run.trainer.step(run.loader, batch, lr=0.0, seed=11).loss
    size = model.config.vocab_size
    return {"log": log.lines, "vocabulary": size, "weights": weights, "documents": documents, "loss": loss}


def start_all(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [start(case) for case in cases]


class Log(logging.Handler):
    """Keeps the messages."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
