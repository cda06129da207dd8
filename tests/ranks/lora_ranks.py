"""Training of adapters, run on each rank of a test: the numbers that `tests.reference_lora` computes independently."""

import zlib
from typing import Any

import numpy as np
import torch

from fira.data.loader import Loader
from fira.data.text_windows import TextWindows
from fira.models.adapters import add_adapters
from fira.models.registry import from_document
from fira.nn.lora import Lora
from fira.optim.lr_schedule import learning_rate
from fira.optim.settings import OptimizerSettings
from fira.parallel.batch_split import BatchSplit
from fira.parallel.parallelize import parallelize
from fira.parallel.param_shard import ParamShard
from fira.training.trainer import Trainer
from pipeline.mesh import CPU, Layout, make_mesh
from pipeline.schedule import SCHEDULES
from tests.ranks.parity_ranks import meta_model
from tests.ranks.reference_ranks import Tokens
from tests.reference_training import Settings, token_ids


def train(
    model: dict[str, Any],
    lora: str,
    settings: dict[str, Any],
    layout: list[int],
    microbatch: int,
    dtype: str = "float64",
    schedule: str = "1f1b",
    recompute: int = 0,
    devices: int = 1,
    shard: str | None = None,
) -> dict[str, Any]:
    """Train the adapters of a new model, whose matrices B are not zero, and return this rank's numbers.

    "base", "initial", "weights": frozen weights, adapters before, and adapters after the last step, by name, each as
    (first row, values). "gradients": of the first step, before clipping. "steps": loss, auxiliary loss and norm of each
    step. "trained": names of all tensors with a gradient, of all entries of the norm, and of the optimizer's moments.
    """
    torch.set_num_threads(1)
    config, s = from_document(model), Settings(**settings)
    mesh = make_mesh(Layout(*layout), SCHEDULES[schedule].placement(layout[0]), [CPU] * devices)
    whole = meta_model(config)
    add_adapters(whole, Lora.parse(lora))
    parameters = getattr(torch, dtype)
    built = parallelize(whole, mesh, 7, [CPU] * devices, schedule, parameters, recompute=recompute, shard=shard)
    for part in built.shards:
        if part.kept and torch.count_nonzero(part.parameter) == 0:
            _fill(part)
    split = BatchSplit(microbatch, mesh.layout.dp, mesh.dp_rank, config.d_model, CPU, parameters)
    trainer = Trainer(built, mesh, split, schedule, OptimizerSettings(weight_decay=s.weight_decay), s.clip, fp16=False)
    ids = token_ids(config.vocab_size, s.windows * config.seq_len + 1)
    loader = Loader(TextWindows(Tokens(ids), config.seq_len), s.loader_seed)  # type: ignore[arg-type]
    base, initial, gradients = _values(built.frozen), _values(built.shards), {}
    steps = []
    for step in range(1, s.steps + 1):
        result = trainer.step(loader, s.batch, learning_rate(step, s.steps, s.peak, s.low, s.warmup), 11, [])
        steps.append([result.loss, result.aux_loss, result.grad_norm])
        if step == 1:
            clipping = min(1.0, s.clip / (result.grad_norm + 1e-6))
            gradients = {n: (start, (g / clipping).tolist()) for n, start, g in _gradients(built.shards)}
    with_gradient = [
        s.name for s in [*built.shards, *built.frozen] if s.leaf.grad is not None or s.parameter.grad is not None
    ]
    return {
        "base": base,
        "initial": initial,
        "gradients": gradients,
        "steps": steps,
        "weights": _values(built.shards),
        "trained": {"gradients": with_gradient, "norms": trainer.norms.names, "moments": [*trainer.optimizer.moments]},
    }


def _fill(shard: ParamShard) -> None:
    """Fill the rows of a shard from a generator seeded by the tensor's name."""
    values = np.random.default_rng(zlib.crc32(shard.name.encode())).normal(scale=0.1, size=shard.shape)
    with torch.no_grad():
        shard.parameter.copy_(torch.from_numpy(values[shard.start : shard.start + len(shard.parameter)]))


def _values(shards: list[ParamShard]) -> dict[str, Any]:
    return {shard.name: (shard.start, shard.parameter.tolist()) for shard in shards if shard.kept}


def _gradients(shards: list[ParamShard]) -> list[tuple[str, int, torch.Tensor]]:
    return [(shard.name, shard.start, shard.parameter.grad) for shard in shards if shard.parameter.grad is not None]


def train_all(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Run several trainings in one job, because starting ranks takes longer than training."""
    return [train(**case) for case in cases]
