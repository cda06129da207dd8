"""The whole model of a distributed one, on each rank of a test."""

from typing import Any

import torch

from fira.models.registry import build, from_document
from fira.parallel.parallelize import parallelize
from fira.parallel.whole_model import whole_model
from pipeline.mesh import CPU, Layout, make_mesh
from pipeline.schedule import SCHEDULES


def differences(documents: list[dict[str, Any]], layouts: list[tuple[str, list[int]]]) -> list[str]:
    """Return the weights that differ from those of a model in one process, and the models that compute other logits."""
    found = []
    for document in documents:
        config = from_document(document)
        expected = build(config).double().eval()  # its weights are drawn with seed 0
        for schedule, layout in layouts:
            with torch.device("meta"):
                model = build(config)
            mesh = make_mesh(Layout(*layout), SCHEDULES[schedule].placement(layout[0]))
            whole = whole_model(parallelize(model, mesh, 0, [CPU], schedule, torch.float64), mesh)
            weights = whole.weights()
            place = f"{document['family']} {layout}: "
            found += [place + name for name, value in expected.weights().items() if not close(weights[name], value)]
            tokens = torch.arange(1, 9)[None]
            with torch.no_grad():
                found += [] if close(whole(tokens), expected(tokens)) else [f"{place}logits"]
    return found


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether tensors are equal apart from the rounding of fp32 weights."""
    return one.dtype == other.dtype and torch.allclose(one.double(), other.double(), rtol=1e-4, atol=1e-5)
