"""Reduction, norm and clipping of gradients, run on each rank of a test."""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fira.data.loader import Loader
from fira.data.text_windows import TextWindows
from fira.models.fira import FiraConfig
from fira.optim.settings import OptimizerSettings
from fira.parallel.batch_split import BatchSplit
from fira.parallel.gradients import NormVector
from fira.parallel.owners import Owners
from fira.parallel.parallelize import parallelize
from fira.parallel.tied_embedding import TiedWeight
from fira.training.trainer import Trainer
from pipeline.mesh import CPU, Layout, Mesh, make_mesh
from tests.ranks.parity_ranks import SEQ_LEN, Tokens, meta_model

CONFIG = FiraConfig(vocab_size=61, seq_len=SEQ_LEN, d_model=24, n_head=3, num_layers=2, d_ff=20, num_experts=4)


def check_all(layout: list[int]) -> dict[str, Any]:
    torch.set_num_threads(1)
    mesh = make_mesh(Layout(*layout), range(layout[0]))
    result: dict[str, Any] = {"tied": tied(mesh)}
    if mesh.layout.pp == 1:
        result |= norms(mesh)
    if mesh.layout.world == 1:
        result["clipped"] = {str(clip): clipped(mesh, clip) for clip in (0.0, 0.3, 1e9)}
    return result


def norms(mesh: Mesh) -> dict[str, Any]:
    """Return the norm vector, summed over ranks, of gradients that equal the weights plus 0.5."""
    model = parallelize(meta_model(CONFIG), mesh, 7, [CPU], dtype=torch.float64)
    expected = []
    for shard in model.shards:
        shard.parameter.grad = shard.parameter.detach() + 0.5
        rows = shard.parameter.grad if shard.expert else [shard.parameter.grad]
        expected += [float(row.square().sum()) for row in rows]
    vector = NormVector(model, Owners(model, mesh))
    entries = vector.local()
    dist.all_reduce(entries)
    return {"names": vector.names, "norms": entries.tolist(), "expected_norms": expected}


def clipped(mesh: Mesh, clip: float) -> list[float]:
    """Return the gradient norm that a step reports, and the norm of the gradients after clipping."""
    model = parallelize(meta_model(CONFIG), mesh, 7, [CPU], dtype=torch.float64)
    split = BatchSplit(2, 1, 0, CONFIG.d_model)
    trainer = Trainer(model, mesh, split, "1f1b", OptimizerSettings(), clip=clip, fp16=False)
    loader = Loader(TextWindows(Tokens(CONFIG.vocab_size), SEQ_LEN), seed=3)  # type: ignore[arg-type]
    grad_norm = trainer.step(loader, 4, 1e-3, seed=11).grad_norm
    return [grad_norm, float(torch.cat([s.parameter.grad.flatten() for s in model.shards]).norm())]


def tied(mesh: Mesh) -> dict[str, Any]:
    """Return gradients and values of a tied weight: embedding 3 with gradient 2, head 0 with gradient 3."""
    is_first, is_last = mesh.pp_rank == 0, mesh.pp_rank == mesh.layout.pp - 1
    original = nn.Parameter(torch.full((2,), 3.0)) if is_first else None
    copy = nn.Parameter(torch.zeros(2)) if is_last else None
    if original is not None:
        original.grad = torch.full((2,), 2.0)
    if copy is not None:
        copy.grad = torch.full((2,), 3.0)
    weight = TiedWeight(original, copy, mesh.groups["pp"], 0, mesh.layout.pp - 1)
    weight.sum_gradients()
    weight.share_value()
    return {
        "grad": original.grad.tolist() if original is not None and original.grad is not None else None,
        "copy": copy.tolist() if copy is not None else None,
        "copy_grad": copy.grad if copy is not None else None,
    }
