"""Training, saving and resuming of a model family, run on each rank of a test."""

import json
from pathlib import Path
from typing import Any

import torch

from fira.checkpoint.shards import Checkpoint
from fira.checkpoint.step_folders import find
from fira.checkpoint.writer import CheckpointWriter
from fira.data.loader import Loader
from fira.data.text_windows import TextWindows
from fira.models.registry import from_document
from fira.optim.settings import OptimizerSettings
from fira.parallel.batch_split import BatchSplit
from fira.parallel.parallelize import parallelize
from fira.training import state
from fira.training.trainer import Trainer
from pipeline.mesh import Layout, make_mesh
from tests.ranks import parity_ranks


class Training:
    """A model that is trained on one layout, a few steps at a time."""

    def __init__(self, document: dict[str, Any], layout: list[int]) -> None:
        config = from_document(document)
        mesh = make_mesh(Layout(*layout), range(layout[0]))
        model = parity_ranks.meta_model(config)
        built = parallelize(model, mesh, 7, [torch.device("cpu")], dtype=torch.float64)
        split = BatchSplit(2, mesh.layout.dp, mesh.dp_rank, config.d_model)
        self.trainer = Trainer(built, mesh, split, "1f1b", OptimizerSettings(), clip=1.0, fp16=False)
        self.loader = Loader(TextWindows(parity_ranks.Tokens(config.vocab_size), config.seq_len), seed=3)  # type: ignore[arg-type]

    def steps(self, count: int) -> list[list[float]]:
        results = [self.trainer.step(self.loader, 4, 1e-2, seed=11) for _ in range(count)]
        return [[result.loss, result.aux_loss, result.grad_norm] for result in results]


def train_all(cases: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the results of `parity_ranks.train` for all cases."""
    return {"trained": parity_ranks.train_all(cases)}


def train_and_reshard(
    cases: list[dict[str, Any]], models: dict[str, dict[str, Any]], layouts: list[list[int]]
) -> dict[str, Any]:
    """Run `train_all`; then save each model and resume it on every layout.

    models: config documents by the folder in which the model is saved.
    """
    return train_all(cases) | {
        "resharded": [_reshard(model, layouts, Path(folder)) for folder, model in models.items()]
    }


def _reshard(model: dict[str, Any], layouts: list[list[int]], folder: Path) -> dict[str, Any]:
    """Train four steps on the first layout and save after two; resume on every layout for the other two."""
    uninterrupted = Training(model, layouts[0])
    uninterrupted.steps(2)
    writer = CheckpointWriter(folder, keep=1)
    state.save(writer, 2, uninterrupted.trainer, uninterrupted.loader, {}, settings={})
    writer.finish()
    step = find(folder)
    saved = Checkpoint.open(step)
    continued = [uninterrupted.steps(2)]
    for layout in layouts:
        resumed = Training(model, layout)
        state.restore(saved, resumed.trainer, resumed.loader, {})
        continued.append(resumed.steps(2))
    return {"continued": continued, "names": sorted(json.loads((step / "index.json").read_text())["tensors"])}
