"""What each rank of a family's test does."""

from pathlib import Path
from typing import Any

import torch

from fira.checkpoint.shards import Checkpoint, find
from fira.data.loader import Loader
from fira.models.registry import from_document
from fira.parallel.batch_split import BatchSplit
from fira.parallel.parallelize import parallelize
from fira.training import state
from fira.training.trainer import Trainer
from pipeline.mesh import Layout, make_mesh
from tests.ranks import parity_ranks


class Training:
    """A model on a layout, one step at a time."""

    def __init__(self, model: dict[str, Any], layout: list[int]) -> None:
        config = from_document(model)
        mesh = make_mesh(Layout(*layout))
        built = parallelize(config, mesh, config.seq_len, 7, [torch.device("cpu")], dtype=torch.float64)
        split = BatchSplit(2, mesh.layout.dp, mesh.dp_rank, config.d_model)
        self.trainer = Trainer(built, mesh, split, "1f1b", weight_decay=0.1, clip=1.0, fp16=False)
        self.loader = Loader(parity_ranks.Tokens(config.vocab_size), config.seq_len, seed=3)  # type: ignore[arg-type]

    def steps(self, count: int) -> list[list[float]]:
        results = [self.trainer.step(self.loader, 4, 1e-2, seed=11, flags=[]) for _ in range(count)]
        return [[result.loss, result.aux_loss, result.grad_norm] for result in results]


def train_all(cases: list[dict[str, Any]]) -> dict[str, Any]:
    """`parity_ranks.train` of all cases."""
    return {"trained": parity_ranks.train_all(cases)}


def train_and_move(
    cases: list[dict[str, Any]], models: dict[str, dict[str, Any]], layouts: list[list[int]]
) -> dict[str, Any]:
    """`train_all`; then trainings that are saved and taken up by every layout. models: by the folder to save in."""
    return train_all(cases) | {"moved": [_move(model, layouts, Path(folder)) for folder, model in models.items()]}


def _move(model: dict[str, Any], layouts: list[list[int]], folder: Path) -> dict[str, Any]:
    """The first layout trains four steps and saves after two; all of them take that up and make the other two."""
    whole = Training(model, layouts[0])
    whole.steps(2)
    state.save(folder, 2, whole.trainer, whole.loader, None, keep=1)
    saved = Checkpoint.open(find(folder))
    continued = [whole.steps(2)]
    for layout in layouts:
        other = Training(model, layout)
        state.restore(saved, other.trainer, other.loader, None)
        continued.append(other.steps(2))
    return {"continued": continued, "names": saved.names()}
