"""The optimizer of a rank's parameters."""

import torch

from fira.optim.adamw import AdamW
from fira.optim.muon import Muon, Replicated
from fira.optim.settings import OptimizerSettings
from fira.parallel.owners import Owners
from fira.parallel.parallelize import DistributedModel
from fira.parallel.param_shard import ParamShard


def make_optimizer(model: DistributedModel, owners: Owners, settings: OptimizerSettings) -> AdamW:
    """The optimizer of the parameters that this rank updates; its `step` is collective over the ranks of a stage."""
    shards = owners.updated
    parameters = {shard.name: shard.parameter for shard in shards}
    decayed = {shard.name for shard in decayed_matrices(model)}
    experts = {shard.name for shard in shards if shard.expert}
    if settings.optimizer == "adamw":
        return AdamW(parameters, decayed, settings, experts)
    hidden = [shard for shard in hidden_matrices(model) if shard.name in parameters]
    replicated = [
        Replicated([shard.name for shard in hidden if shard.expert == expert], None if owners.sharded else group)
        for expert, group in owners.groups.items()
    ]
    # The products of the steps have this dtype on the same device, so that it has instructions for it.
    in_bf16 = model.device.type == "cuda" and model.engine.message_dtype is torch.bfloat16
    return Muon(parameters, decayed, settings, experts, replicated, torch.bfloat16 if in_bf16 else None)


def hidden_matrices(model: DistributedModel) -> list[ParamShard]:
    """The matrices of the blocks, without those of routers. Embedding and head are the first and the last layer."""
    routers = {id(parameter) for moe in model.moe for parameter in moe.router.parameters()}
    blocks = range(1, model.stages[-1].stop - 1)
    return [shard for shard in decayed_matrices(model) if shard.layer in blocks and id(shard.parameter) not in routers]


def decayed_matrices(model: DistributedModel) -> list[ParamShard]:
    """The matrices of the model, without the tables of value embeddings."""
    tables = model.value_tables()
    return [shard for shard in model.shards if shard.is_matrix and shard.name not in tables]
