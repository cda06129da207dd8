"""The whole model of a distributed one, on each rank of a test."""

from typing import Any

import torch
from torch import nn

from fira.models.adapters import add_adapters
from fira.models.language_model import LanguageModel
from fira.models.registry import build, from_document
from fira.nn.init import initialise
from fira.nn.lora import Lora
from fira.parallel.parallelize import parallelize
from fira.parallel.whole_model import whole_model
from pipeline.mesh import CPU, Layout, make_mesh
from pipeline.schedule import SCHEDULES


def differences(
    cases: list[tuple[dict[str, Any], str | None]], layouts: list[tuple[str, list[int], str | None]]
) -> list[str]:
    """Return the weights that differ from those of a model in one process, and the models that compute other logits.

    cases: documents of models, and their adapters if they have any.
    """
    found = []
    for document, lora in cases:
        expected = in_one_process(document, lora)
        for schedule, layout, shard in layouts:
            mesh = make_mesh(Layout(*layout), SCHEDULES[schedule].placement(layout[0]))
            model = on_meta_device(document, lora)
            parallel = parallelize(model, mesh, 3, [CPU], schedule, torch.float64, shard=shard)
            whole = whole_model(parallel, mesh)
            place = f"{document['family']} {lora} {layout} {shard}: "
            weights, wanted = whole.weights(), expected.weights()
            assert weights.keys() == wanted.keys()
            found += [place + name for name, value in wanted.items() if not torch.equal(weights[name], value)]
            tokens = torch.arange(1, 9)[None]
            with torch.no_grad():
                found += [] if torch.equal(whole(tokens), expected(tokens)) else [f"{place}logits"]
    return found


def on_meta_device(document: dict[str, Any], lora: str | None) -> LanguageModel:
    with torch.device("meta"):
        model = build(from_document(document))
        if lora:
            add_adapters(model, Lora.parse(lora))
    return model


def in_one_process(document: dict[str, Any], lora: str | None) -> LanguageModel:
    """A model with the initial weights of `parallelize`."""
    model = on_meta_device(document, lora).to_empty(device="cpu").double()
    model.tie()
    for index, layer in enumerate(model.layers):
        if not (model.tied and index == len(model.layers) - 1):
            initialise(layer, f"layers.{index}", seed=3)
    if model.tied:
        initialise(nn.ModuleDict({"norm": model.layers[-1].norm}), f"layers.{len(model.layers) - 1}", seed=3)
    return model.eval()
