"""The training run that `tests.reference_training` computes independently, run on each rank of a test."""

from typing import Any

import numpy as np
import torch

from fira.data.loader import Loader, ValidationSequences
from fira.data.text_windows import TextWindows
from fira.models.registry import from_document
from fira.optim.lr_schedule import learning_rate
from fira.optim.settings import OptimizerSettings
from fira.parallel.batch_split import BatchSplit
from fira.parallel.parallelize import DistributedModel, parallelize
from fira.training.trainer import Trainer
from pipeline.mesh import CPU, Layout, make_mesh
from tests.ranks.parity_ranks import meta_model
from tests.reference_training import Settings, token_ids


class Tokens:
    """Token ids as the loader reads them."""

    def __init__(self, ids: np.ndarray) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.ids[start:stop]


def train(
    model: dict[str, Any], settings: dict[str, Any], layout: list[int], dtype: str, microbatch: int, validation: int
) -> dict[str, Any]:
    """Return losses, norms and learning rates of each step, the final validation loss, and this rank's weights.

    validation: the number of validation tokens. "initial", "weights": by name, (first row, values).
    """
    torch.set_num_threads(1)
    config, s = from_document(model), Settings(**settings)
    mesh = make_mesh(Layout(*layout), range(layout[0]))
    built = parallelize(meta_model(config), mesh, 7, [CPU], "1f1b", getattr(torch, dtype))
    split = BatchSplit(microbatch, mesh.layout.dp, mesh.dp_rank, config.d_model)
    trainer = Trainer(built, mesh, split, "1f1b", OptimizerSettings(weight_decay=s.weight_decay), s.clip, fp16=False)
    ids = token_ids(config.vocab_size, s.windows * config.seq_len + 1)
    loader = Loader(TextWindows(Tokens(ids), config.seq_len), s.loader_seed)  # type: ignore[arg-type]
    initial, steps = _weights(built), []
    for step in range(1, s.steps + 1):
        lr = learning_rate(step, s.steps, s.peak, s.low, s.warmup)
        result = trainer.step(loader, s.batch, lr, 11, [])
        steps.append([result.loss, result.aux_loss, result.grad_norm, lr])
    held_out = ValidationSequences(
        TextWindows(Tokens(token_ids(config.vocab_size, validation)), config.seq_len, complete=False)
    )  # type: ignore[arg-type]
    loss = trainer.forward.mean(held_out, s.batch).loss
    return {"initial": initial, "steps": steps, "val_loss": loss, "weights": _weights(built)}


def _weights(built: DistributedModel) -> dict[str, Any]:
    return {part.name: (part.start, part.parameter.tolist()) for part in built.shards}


def train_all(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Run several trainings in one job, because starting ranks takes longer than training."""
    return [train(**case) for case in cases]
