"""What Muon updates in models that are built on several ranks, and the moments of its optimizer."""

from typing import Any

import torch

from fira.models.adapters import add_adapters
from fira.models.language_model import LanguageModel
from fira.models.registry import build, make_config
from fira.nn.lora import Lora
from fira.optim.settings import OptimizerSettings
from fira.parallel.owners import Owners
from fira.parallel.parallelize import parallelize
from fira.parallel.rank_optimizer import hidden_matrices, make_optimizer
from pipeline.mesh import CPU, Layout, make_mesh


def meta_model(preset: str, changes: dict[str, Any] | None = None, lora: str | None = None) -> LanguageModel:
    with torch.device("meta"):
        model = build(make_config(preset, changes or {}))
        if lora:
            add_adapters(model, Lora.parse(lora))
    return model


def updates(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The global shapes of hidden matrices, and the elements of this rank's moments, for each case."""
    return [_update(**case) for case in cases]


def _update(layout: list[int], shard: str | None, **model: Any) -> dict[str, Any]:
    mesh = make_mesh(Layout(*layout), range(layout[0]))
    built = parallelize(meta_model(**model), mesh, 0, [CPU], shard=shard)
    optimizer = make_optimizer(built, Owners(built, mesh), OptimizerSettings(optimizer="muon"))
    return {
        "hidden": sorted(shard.shape for shard in hidden_matrices(built)),
        "moments": sum(moment.numel() for moments in optimizer.moments.values() for moment in moments),
    }
