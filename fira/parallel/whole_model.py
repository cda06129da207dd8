"""The whole model in every process, with the current weights of a distributed model."""

import torch
import torch.distributed as dist

from fira.models.adapters import add_adapters
from fira.models.language_model import LanguageModel
from fira.models.registry import build
from fira.parallel.parallelize import DistributedModel
from fira.parallel.param_shard import ParamShard, replica_rank
from pipeline.mesh import Mesh


@torch.no_grad()
def whole_model(model: DistributedModel, mesh: Mesh) -> LanguageModel:
    """Return a copy of the whole model in eval mode on this rank's first device (collective)."""
    whole = _without_weights(model)
    own = {shard.name: shard for shard in _owned_shards(model, mesh)}
    weights = {}
    for name, tensor in whole.weights().items():
        # One rank has each row and the others add zero, so that the sums are exact.
        value = torch.zeros(tensor.shape, dtype=_dtype(model) if tensor.is_floating_point() else tensor.dtype)
        if name in own:
            shard = own[name]
            rows = value[shard.start : shard.start + len(shard.parameter)] if shard.shape else value
            rows.copy_(shard.parameter)
        dist.all_reduce(value)
        weights[name] = value.to(model.device)
    whole.load_state_dict(weights, strict=not whole.tied, assign=True)
    whole.tie()
    return whole.eval()


def whole_size(model: DistributedModel) -> int:
    """Return the size of the whole model in bytes."""
    return sum(tensor.numel() for tensor in _without_weights(model).weights().values()) * _dtype(model).itemsize


def _without_weights(model: DistributedModel) -> LanguageModel:
    with torch.device("meta"):
        whole = build(model.config)
        if model.lora:
            add_adapters(whole, model.lora)
    return whole


def _dtype(model: DistributedModel) -> torch.dtype:
    return next(shard.parameter.dtype for shard in [*model.shards, *model.frozen])


def _owned_shards(model: DistributedModel, mesh: Mesh) -> list[ParamShard]:
    """This rank's shards, each row of which belongs to one rank only: without copies, such as that of a tied weight."""
    own = {i for stage, rank in zip(model.stages, model.placement, strict=True) if rank == mesh.pp_rank for i in stage}
    return [
        shard
        for shard in [*model.shards, *model.frozen, *model.buffers]
        if shard.layer in own and shard.owner == replica_rank(mesh, shard.expert)
    ]
