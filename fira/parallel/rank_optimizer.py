"""The optimizer of a rank's parameters."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fira.nn.embedding import TokenTable
from fira.nn.moe.router import Router
from fira.nn.value_embedding import ValueEmbedding
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
    scales = lr_scales(model, settings)
    if settings.optimizer == "adamw":
        return AdamW(parameters, decayed, settings, experts, scales)
    hidden = [shard for shard in hidden_matrices(model) if shard.name in parameters]
    replicated = [
        Replicated([shard.name for shard in hidden if shard.expert == expert], None if owners.sharded else group)
        for expert, group in owners.groups.items()
    ]
    dtype = product_dtype(model.device, model.engine.message_dtype)
    return Muon(parameters, decayed, settings, experts, replicated, dtype, scales)


def lr_scales(model: DistributedModel, settings: OptimizerSettings) -> dict[str, float]:
    """The factors of the learning rate of this rank's embeddings and routers, by name."""
    scales: dict[Tensor, float] = {}
    for module in model.modules():
        if isinstance(module, TokenTable | Router):
            scale = settings.embedding_lr_scale if isinstance(module, TokenTable) else settings.router_lr_scale
            scales |= dict.fromkeys(module.parameters(), scale)
    return {shard.name: scales[shard.parameter] for shard in model.shards if shard.parameter in scales}


def product_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype | None:
    """The dtype of Muon's products, None: that of the parameters. dtype: of the products of a step on this device."""
    # A GPU that computes the steps in bf16 has instructions for it.
    return torch.bfloat16 if device.type == "cuda" and dtype is torch.bfloat16 else None


def hidden_matrices(model: DistributedModel) -> list[ParamShard]:
    """The matrices that Muon updates, see `not_hidden`. Embedding and head are the first and the last layer."""
    others, blocks = not_hidden(model.modules()), range(1, model.stages[-1].stop - 1)
    matrices = (shard for shard in model.shards if shard.is_matrix)
    return [shard for shard in matrices if shard.layer in blocks and shard.parameter not in others]


def not_hidden(modules: Iterable[nn.Module]) -> set[Tensor]:
    """The parameters of blocks that AdamW updates even if they are matrices: of routers and of value embeddings."""
    return {p for module in modules if isinstance(module, Router | ValueEmbedding) for p in module.parameters()}


def decayed_matrices(model: DistributedModel) -> list[ParamShard]:
    """The matrices of the model, without embeddings.

    A row of an embedding has a gradient only if its token is read, so that decay would take rare rows to zero. A norm
    divides by the size of its input: behind a row near zero gradients explode (OLMo et al. 2025, arXiv 2501.00656).
    """
    tables = {p for module in model.modules() if isinstance(module, TokenTable) for p in module.parameters()}
    excluded = {shard.name for shard in model.shards if shard.parameter in tables} | model.value_tables()
    return [shard for shard in model.shards if shard.is_matrix and shard.name not in excluded]
