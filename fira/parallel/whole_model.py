"""The whole model in every process, with the current weights of a distributed model."""

import torch
import torch.distributed as dist

from fira.models.language_model import LanguageModel
from fira.models.registry import build
from fira.parallel.parallelize import DistributedModel, ParamShard
from pipeline.mesh import Mesh


@torch.no_grad()
def whole_model(model: DistributedModel, mesh: Mesh) -> LanguageModel:
    """Return a copy of the whole model in eval mode on this rank's first device (collective)."""
    with torch.device("meta"):
        whole = build(model.config)
    own = {shard.name: shard for shard in owned_shards(model, mesh)}
    dtype = model.shards[0].parameter.dtype
    weights = {}
    for name, tensor in whole.weights().items():
        # One rank has each row and the others add zero, so that the sums are exact.
        value = torch.zeros(tensor.shape, dtype=dtype if tensor.is_floating_point() else tensor.dtype)
        if name in own:
            shard = own[name]
            rows = value[shard.start : shard.start + len(shard.parameter)] if shard.shape else value
            rows.copy_(shard.parameter)
        dist.all_reduce(value)
        weights[name] = value.to(model.device)
    whole.load_state_dict(weights, strict=not whole.tied, assign=True)
    whole.tie()
    return whole.eval()


def owned_shards(model: DistributedModel, mesh: Mesh) -> list[ParamShard]:
    """This rank's shards of parameters and buffers, each row of which belongs to one rank only."""
    shards = [shard for shard in model.shards if (mesh.edp_rank if shard.expert else mesh.dp_rank) == 0]
    return shards + (model.buffers if mesh.dp_rank == 0 else [])
