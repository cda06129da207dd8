"""Measure the update of a layer's parameters."""

from collections import Counter

import torch
from torch import Tensor

from fira.nn.moe.experts import ExpertBank
from fira.optim.adamw import AdamW
from fira.optim.muon import matrices
from fira.optim.newton_schulz import orthogonalized
from fira.optim.settings import OptimizerSettings
from fira.parallel.cast_weights import cast_weights
from fira.parallel.gradients import gradient_of, scale_gradients
from fira.parallel.param_shard import ParamShard
from fira.parallel.rank_optimizer import product_dtype
from fira.planner.measure_machine import median_seconds
from fira.planner.model_profile import LayerKind
from pipeline.one_thread_each import OneThreadEach
from pipeline.stage import DeviceLayers

REPEATS = 3


def measure_optimizer(layers: DeviceLayers) -> float:
    """Seconds per step for the gradients' norm, clipping, AdamW, and the cast of the weights."""
    banks = [module for module in layers.modules() if isinstance(module, ExpertBank)]
    experts = {p for bank in banks for p in bank.parameters(recurse=False)}
    trained = {name: p for name, p in layers.named_parameters() if p.requires_grad}
    shards = [ParamShard(name, p, 0, tuple(p.shape), p in experts, p) for name, p in trained.items()]
    optimizer = AdamW(trained, {shard.name for shard in shards if shard.is_matrix}, OptimizerSettings())

    def step() -> None:
        for shard in shards:
            torch.linalg.vector_norm(gradient_of(shard).flatten(), dtype=torch.float64)
        scale_gradients(shards, 0.99)
        optimizer.step(0.0)
        with cast_weights(layers.modules()):
            pass

    return median_seconds(step, next(layers.parameters()).device, REPEATS)


def measure_orthogonalization(
    kind: LayerKind, dtype: torch.dtype, autocast: torch.dtype | None, device: torch.device
) -> float:
    """Seconds for the matrices that Muon updates, on one rank. Each shape is measured once, on all threads of a CPU."""
    products = product_dtype(device, autocast or dtype) or dtype
    count, pool = (torch.get_num_threads(), OneThreadEach()) if device.type == "cpu" else (1, None)

    def seconds(shape: torch.Size) -> float:
        gradients = [torch.randn(shape, dtype=dtype, device=device)] * count

        def compute() -> list[Tensor]:
            return [*(pool.map if pool else map)(lambda gradient: orthogonalized(gradient, products), gradients)]

        return median_seconds(compute, device, REPEATS) / count

    stacks = (torch.empty(p.shape, device=device) for p in kind.hidden)
    counts = Counter(matrix.shape for matrix in matrices(stacks))
    return sum(count * seconds(shape) for shape, count in counts.items())
