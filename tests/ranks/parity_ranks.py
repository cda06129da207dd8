"""What each rank of a parity test does: a short training of a small fira on made-up tokens."""

from typing import Any

import numpy as np
import torch

from fira.data.loader import Loader
from fira.models.fira import FiraConfig
from fira.models.registry import from_document
from fira.optim.lr_schedule import learning_rate
from fira.parallel.batch_split import BatchSplit
from fira.parallel.parallelize import parallelize
from fira.training.trainer import Trainer
from pipeline.mesh import CPU, Layout, make_mesh

SEQ_LEN = 13


class Tokens:
    """A fixed stream of token ids with some structure to learn."""

    def __init__(self, vocab_size: int, length: int = 4001) -> None:
        rng = np.random.default_rng(5)
        self.ids = (rng.integers(0, 7, length).cumsum() % vocab_size).astype(np.int64)

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.ids[start:stop]


def train(
    layout: list[int],
    schedule: str = "1f1b",
    steps: int = 20,
    batch: int = 5,
    microbatch: int = 1,
    dropout: float = 0.0,
    dtype: str = "float32",
    devices: int = 1,
    recompute: int = 0,
    layers: int = 4,
    d_ff: int = 20,
    model: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Losses, norms and so on of each step, and a digest of the final weights this rank holds.

    model: the document of another model than the fira that the rest describes.
    """
    torch.set_num_threads(1)
    config = FiraConfig(
        vocab_size=61,
        seq_len=SEQ_LEN,
        d_model=24,
        n_head=3,
        num_layers=layers,
        d_ff=d_ff,
        num_experts=4,
        dropout=dropout,
    )
    if model is not None:
        config = from_document(model)
    places = [CPU] * devices
    mesh = make_mesh(Layout(*layout), places)
    built = parallelize(config, mesh, SEQ_LEN, 7, places, schedule, getattr(torch, dtype), recompute=recompute)
    split = BatchSplit(microbatch, mesh.layout.dp, mesh.dp_rank, config.d_model)
    trainer = Trainer(built, mesh, split, schedule, weight_decay=0.1, clip=1.0, fp16=False)
    loader = Loader(Tokens(config.vocab_size), SEQ_LEN, seed=3)  # type: ignore[arg-type]
    results = []
    for step in range(1, steps + 1):
        result = trainer.step(loader, batch, learning_rate(step, steps, 1e-2, 1e-3, 3), seed=11, flags=[])
        results.append([result.loss, result.aux_loss, result.grad_norm])
    weights = {part.name: float(part.parameter.detach().double().sum()) for part in built.parts if not part.expert}
    experts = {"load": result.expert_load, "dropped": result.expert_dropped, "entropy": [result.router_entropy]}
    return {"steps": results, "experts": experts, "weights": weights}


def train_all(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Several trainings one after another: starting ranks takes longer than training them."""
    return [train(**case) for case in cases]
