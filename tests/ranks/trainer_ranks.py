"""One training step of a small model on each rank of a trainer test, and the same quantities from a plain forward."""

from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from fira import FIRA
from fira.data.loader import Loader, ValidationSequences
from fira.data.text_windows import TextWindows
from fira.errors import UserError
from fira.models.blues import BluesConfig
from fira.models.fira import FiraConfig
from fira.models.registry import build
from fira.nn.context import Context, TrainingContext
from fira.optim.settings import OptimizerSettings
from fira.parallel.batch_split import BatchSplit
from fira.parallel.parallelize import parallelize
from fira.training import trainer as module
from fira.training.trainer import Trainer
from pipeline.mesh import CPU, Layout, make_mesh
from tests.ranks.parity_ranks import SEQ_LEN, Tokens, meta_model

CONFIG = FiraConfig(
    vocab_size=61,
    seq_len=SEQ_LEN,
    d_model=24,
    n_head=3,
    num_layers=2,
    d_ff=20,
    num_experts=5,
    dropout=0.0,
    switch_coefficient=0.1,
    capacity_factor=0.6,
    balance_rate=0.25,
)
BATCH = 5  # sequences of a step: with micro-batches of 2, one is padding


TIED = BluesConfig(
    vocab_size=61,
    seq_len=SEQ_LEN,
    d_model=24,
    n_head=6,
    n_kv_head=2,
    num_layers=2,
    d_ff=20,
    noise=0.0,
    dropout=0.0,
)


def make(clip: float = 0.5, fp16: bool = False, pp: int = 1, config: Any = CONFIG) -> tuple[Trainer, Loader]:
    mesh = make_mesh(Layout(pp, torch.distributed.get_world_size() // pp, 1), range(pp))
    model = parallelize(meta_model(config), mesh, 7, [CPU], dtype=torch.float64)
    split = BatchSplit(2, mesh.layout.dp, mesh.dp_rank, CONFIG.d_model)
    trainer = Trainer(model, mesh, split, "1f1b", OptimizerSettings(), clip=clip, fp16=fp16)
    return trainer, Loader(TextWindows(Tokens(CONFIG.vocab_size, 301), SEQ_LEN), seed=3)  # type: ignore[arg-type]


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {s.name: s.parameter.detach().clone() for s in trainer.model.shards}


def plain() -> dict[str, Any]:
    """The results of the first step and of a validation, from one forward of the undivided model."""
    trainer, loader = make()
    model = FIRA(CONFIG).double()
    missing = model.load_state_dict(weights(trainer), strict=False).missing_keys
    assert all(name.endswith("balance") for name in missing)
    tokens, targets = (torch.from_numpy(array) for array in loader.batch(0, BATCH)[:2])
    context = Context(training=TrainingContext(aux_weights=torch.full((BATCH,), 1 / BATCH, dtype=torch.float64)))
    loss = F.cross_entropy(model(tokens, context).flatten(0, 1), targets.flatten())
    loss.backward()  # adds the gradients of the auxiliary losses
    stats = [context.training.stats[layer, 0] for layer in (1, 2)]
    dropped, load = (torch.stack([getattr(s, name) for s in stats]) for name in ("dropped", "load"))
    result = {
        "loss": float(loss),
        "grad_norm": sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None) ** 0.5,
        "aux_loss": sum(float(s.aux) for s in stats),
        "expert_load": (load / load.sum(1, keepdim=True)).tolist(),
        "expert_dropped": [
            [d / max(1, n) for d, n in zip(*pair, strict=True)]
            for pair in zip(dropped.tolist(), load.tolist(), strict=True)
        ],
        "dropped": int(dropped.sum()) / int(load.sum()),
        "router_entropy": [float(s.entropy) / tokens.numel() for s in stats],
        "balance": [[0.25 * float(np.sign(row.double().mean() - n)) for n in row.tolist()] for row in load],
    }
    with torch.no_grad():
        held_out = Tokens(CONFIG.vocab_size, 4 * SEQ_LEN + 6).ids
        total = 0.0
        for start in range(0, len(held_out) - 1, SEQ_LEN):
            row = torch.from_numpy(held_out[start : start + SEQ_LEN + 1])
            total += float(F.cross_entropy(model(row[None, :-1], Context())[0], row[1:], reduction="sum"))
    return result | {"validation": total / (len(held_out) - 1)}


def step(fp16: bool, pp: int = 1) -> dict[str, Any]:
    """A validation and two steps on the same sequences, the first at the learning rate zero."""
    trainer, loader = make(fp16=fp16, pp=pp)
    held_out = ValidationSequences(TextWindows(Tokens(CONFIG.vocab_size, 4 * SEQ_LEN + 6), SEQ_LEN, complete=False))  # type: ignore[arg-type]
    reads, read = [], held_out.batch
    held_out.batch = lambda *numbers: (reads.append(numbers), read(*numbers))[1]  # type: ignore[method-assign]
    validation = trainer.forward.mean(held_out, 2).loss
    result = trainer.step(loader, BATCH, 0.0, seed=11, extra=[1.5, 2.5 + trainer.mesh.rank])
    balance = [moe.router.balance.tolist() for moe in trainer.model.moe]
    consumed, loader.consumed = loader.consumed, 0
    for moe in trainer.model.moe:
        moe.router.balance.zero_()
    second = trainer.step(loader, BATCH, 1e-2, seed=11)
    return {
        **asdict(result),
        "validation": validation,
        "reads": reads,
        "balance": balance,
        "consumed": consumed,
        "second": asdict(second),
        "weights": {name: value.tolist() for name, value in weights(trainer).items()},
        "updates": trainer.optimizer.updates,
    }


def tied() -> dict[str, Any]:
    """A step of a model with tied embeddings, over a pipeline of all ranks: the norm, and the copies after it."""
    trainer, loader = make(pp=torch.distributed.get_world_size(), config=TIED)
    tied = trainer.model.tied
    assert tied is not None
    norm = trainer.step(loader, BATCH, 1e-2, seed=11).grad_norm
    copies = [p.tolist() for p in (tied.original, tied.copy) if p is not None]
    result = {"norm": norm, "copies": copies}
    if len(copies) == 2:
        fresh, loader = make(config=TIED)
        model = build(TIED).double()
        model.load_state_dict(weights(fresh), strict=False)
        tokens, targets = (torch.from_numpy(array) for array in loader.batch(0, BATCH)[:2])
        context = Context(training=TrainingContext(aux_weights=torch.full((BATCH,), 1 / BATCH, dtype=torch.float64)))
        F.cross_entropy(model(tokens, context).flatten(0, 1), targets.flatten()).backward()
        result["plain"] = sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None) ** 0.5
    return result


def overflow(scale: float) -> dict[str, Any]:
    """A step at a loss scale with which the gradients overflow, or not."""
    trainer, loader = make(fp16=True)
    trainer.scale.value = scale
    before = weights(trainer)
    for shard in trainer.model.shards:
        shard.parameter.register_hook(lambda g: torch.where(g.abs() > 1e100, float("inf"), g))
    try:
        result = trainer.step(loader, BATCH, 1e-2, seed=11)
    except UserError as error:
        return {"error": str(error), "scale": trainer.scale.value}
    changed = any(not torch.equal(value, before[name]) for name, value in weights(trainer).items())
    return {"skipped": result.skipped, "changed": changed, "scale": trainer.scale.value, "loss": result.loss}


def not_finite(name: str, value: float, fp16: bool = False) -> dict[str, Any]:
    """The error of a step whose gradient of one parameter (or, for a value that is not finite, weight) is infinite."""
    trainer, loader = make(fp16=fp16)
    (parameter,) = (s.parameter for s in trainer.model.shards if s.name == name)
    if np.isfinite(value):
        parameter.register_hook(lambda g: g * float("inf"))
    else:
        with torch.no_grad():
            parameter[-1] = value
    before = weights(trainer)
    try:
        trainer.step(loader, BATCH, 1e-2, seed=11)
    except UserError as error:
        changed = any(not np.array_equal(w, before[n], equal_nan=True) for n, w in weights(trainer).items())
        return {"error": str(error), "changed": changed, "entries": len(trainer.norms.names)}
    return {"error": ""}


def bubble() -> float:
    """The bubble of a step of 8 s in which this rank waited 2 s."""
    trainer, loader = make()
    run, engine = trainer.model.engine.run, trainer.model.engine

    def waiting(*args: Any) -> Any:
        losses = run(*args)
        engine.waited = lambda: 2.0
        return losses

    engine.run = waiting  # type: ignore[method-assign]
    times, real = iter([100.0, 108.0]), module.time
    module.time = SimpleNamespace(perf_counter=lambda: next(times))  # type: ignore[assignment]
    try:
        return trainer.step(loader, 2, 1e-3, seed=11).bubble  # one micro-batch
    finally:
        module.time = real


def fractions(load: list[int], dropped: list[int]) -> dict[str, Any]:
    """The result of a step in which both layers had these assignments of experts, over all ranks."""
    trainer, loader = make()
    sums, ranks = trainer._step_sums, trainer.mesh.layout.world
    given = {name: torch.tensor([row] * 2).double() / ranks for name, row in (("load", load), ("dropped", dropped))}
    trainer._step_sums = lambda *args: replace(sums(*args), **given)  # type: ignore[method-assign]
    return asdict(trainer.step(loader, 2, 1e-3, seed=11))


def copies() -> list[dict[str, bool]]:
    """How a step copies the extra numbers to the device."""
    trainer, loader = make()
    recorded, pinned_for = [], module.pinned_for

    def to(numbers: torch.Tensor, **options: bool) -> torch.Tensor:
        recorded.append(options)
        return numbers

    module.pinned_for = lambda _, numbers: SimpleNamespace(to=lambda device, **options: to(numbers, **options))  # type: ignore[assignment]
    try:
        trainer.step(loader, 2, 1e-3, seed=11)
    finally:
        module.pinned_for = pinned_for
    return recorded


def check_all() -> dict[str, Any]:
    torch.set_num_threads(1)
    return {
        "plain": plain(),
        "fp32": step(False),
        "fp16": step(True),
        "pipeline": step(False, pp=torch.distributed.get_world_size()),
        "tied": tied(),
        "bubble": bubble(),
        "copies": copies(),
        "fractions": fractions(load=[0, 1, 3, 4, 8], dropped=[0, 1, 1, 0, 2]),
        "overflow": [overflow(scale) for scale in (2.0**400, 1.0, 2.0**-14, 2.0**-15)],
        "errors": [not_finite(*case) for case in (("layers.2.norm1.weight", 1.0), ("layers.2.moe.experts.w1", np.nan))],
        "ignored": not_finite("layers.2.norm1.weight", 1.0, fp16=True),
    }
