"""Training with gradients that are reduced during the backward and after it, run on each rank of a test."""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fira.data.loader import Loader
from fira.data.text_windows import TextWindows
from fira.models.blues import BluesConfig
from fira.models.fira import FiraConfig
from fira.models.microrwkv import MicroRWKVConfig
from fira.optim.settings import OptimizerSettings
from fira.parallel.batch_split import BatchSplit
from fira.parallel.overlapped_reduction import OverlappedReduction
from fira.parallel.parallelize import parallelize
from fira.parallel.param_shard import ParamShard
from fira.training.trainer import Trainer
from pipeline.mesh import CPU, Layout, Mesh, make_mesh
from pipeline.schedule import SCHEDULES, Action
from pipeline.split_backward import run_backward
from tests.ranks.parity_ranks import SEQ_LEN, Tokens, meta_model
from tests.ranks.plain_reduction import PlainReduction

SIZES: dict[str, Any] = {"vocab_size": 61, "seq_len": SEQ_LEN, "num_layers": 6, "d_ff": 20}
CONFIGS = {
    # Of 40 experts, most get no tokens in a step.
    "fira": FiraConfig(**SIZES, d_model=24, n_head=3, num_experts=4, dropout=0.1),
    "many experts": FiraConfig(**SIZES, d_model=24, n_head=3, num_experts=40, top_k=1),
    "tied": BluesConfig(**SIZES, d_model=24, n_head=6, n_kv_head=2, noise=0.0, dropout=0.0),
    "shared weights": MicroRWKVConfig(vocab_size=61, seq_len=40, num_layers=4, d_model=32),
}


class LoggedReduction(OverlappedReduction):
    """Notes in `log` the layers whose reductions start, where the last backward of a stage ends, and the end."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.log: list[int | str] = []

    @contextmanager
    def around_backward(self, action: Action, last: bool) -> Iterator[None]:
        with super().around_backward(action, last):
            yield
            if last:
                self.log.append(f"end of stage {action.stage}")

    def finish(self) -> None:
        self.log.append("finish")
        super().finish()

    def _start(self, shards: Sequence[ParamShard]) -> None:
        super()._start(shards)
        self.log += sorted({int(shard.name.split(".")[1]) for shard in shards})


def compare_all(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [compare(**case) for case in cases]


def compare(
    layout: list[int],
    schedule: str = "1f1b",
    model: str = "fira",
    recompute: int = 0,
    devices: int = 1,
    dtype: str = "float32",
    backend: str = "mpi",
    fp16: bool = False,
    autocast: str | None = None,
) -> dict[str, Any]:
    """Train two steps in both ways.

    Returns the results of the steps in both ways, the largest difference of a gradient (their norm is clipped to 1),
    the number of gradients compared, and the log of the last step.
    """
    torch.set_num_threads(1)
    mesh = make_mesh(Layout(*layout), SCHEDULES[schedule].placement(layout[0]), [CPU] * devices)
    mesh = dataclasses.replace(mesh, device_type="cuda")  # experts do not separate the rows of sending ranks
    if backend == "gloo":
        mesh = dataclasses.replace(mesh, groups=mesh.groups | {axis: gloo_group(mesh, axis) for axis in ("dp", "edp")})
    precision = getattr(torch, dtype), autocast and getattr(torch, autocast)
    after, during = (
        make_trainer(mesh, schedule, CONFIGS[model], recompute, devices, *precision, fp16=fp16) for _ in range(2)
    )
    after.reduction = PlainReduction(after.model, mesh)
    during.reduction = reduction = LoggedReduction(during.model, mesh)
    steps = []
    for trainer in (after, during):
        loader = Loader(TextWindows(Tokens(61), CONFIGS[model].seq_len), seed=3)  # type: ignore[arg-type]
        for _ in range(2):
            reduction.log.clear()
            result = trainer.step(loader, 5, 1e-2, seed=11)
            steps.append([result.loss, result.aux_loss, result.grad_norm])
    differences = [
        float((a.parameter.grad - b.parameter.grad).abs().max())
        for a, b in zip(after.model.shards, during.model.shards, strict=True)
    ]
    return {
        "after": steps[:2],
        "during": steps[2:],
        "difference": max(differences),
        "compared": len(differences),
        "stages": {n: list(during.model.stages[n]) for n in during.model.engine.stages},
        "tied": during.model.tied is not None,
        "log": reduction.log,
    }


def gloo_group(mesh: Mesh, axis: str) -> Any:
    return dist.new_group(mesh.layout.group(axis, mesh.rank), backend="gloo", use_local_synchronization=True)


def make_trainer(
    mesh: Mesh,
    schedule: str,
    config: Any,
    recompute: int = 0,
    devices: int = 1,
    dtype: torch.dtype = torch.float32,
    autocast: torch.dtype | None = None,
    fp16: bool = False,
) -> Trainer:
    built = parallelize(
        meta_model(config), mesh, 7, [CPU] * devices, schedule, dtype, autocast=autocast, recompute=recompute
    )
    split = BatchSplit(devices, mesh.layout.dp, mesh.dp_rank, config.d_model)
    return Trainer(built, mesh, split, schedule, OptimizerSettings(), clip=1.0, fp16=fp16)


def late_gradient() -> str:
    """The error when a gradient arrives for a layer whose reduction has started."""
    mesh = make_mesh(Layout(1, dist.get_world_size(), 1), [0])
    trainer = make_trainer(mesh, "1f1b", CONFIGS["fira"])
    trainer.reduction = OverlappedReduction(trainer.model, mesh)
    layer_2, layer_4 = (
        next(s.parameter for s in trainer.model.shards if s.name == f"layers.{i}.norm1.weight") for i in (2, 4)
    )

    def add_to_layer_4(_: Tensor) -> None:
        with torch.enable_grad():
            run_backward([layer_4 * 2], [torch.ones_like(layer_4)])

    layer_2.register_post_accumulate_grad_hook(add_to_layer_4)
    try:
        trainer.step(Loader(TextWindows(Tokens(61), SEQ_LEN), seed=3), 5, 1e-2, seed=11)  # type: ignore[arg-type]
    except RuntimeError as error:
        return str(error)
    return ""
