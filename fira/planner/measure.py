"""Measure the costs of layers and links on this machine, and cache them on disk. All ranks measure simultaneously.

measure ─ measure_machine  ─ memory bandwidth and links
        └ _measure_layers  ─ _measure_layer per kind of layer and micro-batch size
"""

import copy
import hashlib
import json
import os
import platform
import statistics
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fira.data.cache import cache_folder
from fira.data.rows import Rows
from fira.devices import AUTOCAST_DTYPES, keep_freed_memory, parameter_dtype
from fira.host_memory import available_memory
from fira.models.registry import to_document
from fira.nn.init import initialise
from fira.nn.moe.experts import ExpertBank
from fira.optim.adamw import AdamW
from fira.optim.settings import OptimizerSettings
from fira.parallel.batch_split import BatchSplit
from fira.parallel.cast_weights import cast_weights
from fira.parallel.gradients import gradient_of, scale_gradients
from fira.parallel.microbatch_loss import microbatch_loss
from fira.parallel.param_shard import ParamShard
from fira.planner.costs import CostModel, LayerCost
from fira.planner.device_specs import OPERATIONS, Hardware, Link
from fira.planner.measure_machine import measure_machine, median_seconds, synchronize
from fira.planner.model_profile import ModelProfile, logits_bytes, measure_saved_bytes
from fira.progress_bar import progress_bar
from pipeline.mpi import World
from pipeline.stage import DeviceLayers, Stage

MEASUREMENT_FORMAT = 4  # part of every cache key; increase it when the cached values change
REPEATS = 5
IN_FLIGHT = 2  # micro-batches, as in a pipeline
PASSES = ("forward", "backward_input", "backward_weight", "backward")  # methods of a stage that are timed
MAX_SECONDS = 2.0  # of one layer's forward and backward; costs of larger micro-batches are scaled instead of measured


def measure(
    profile: ModelProfile, sizes: Sequence[int], precision: str, device: torch.device, ranks: int, world: World
) -> tuple[Hardware, CostModel]:
    """Measure this machine, and the cost of each kind of layer at these micro-batch sizes (collective).

    ranks: the number of ranks to plan for. If the world has fewer, this process measures with as many threads as one
    of them would have, and durations are multiplied by the number of ranks per core.
    """
    keep_freed_memory()  # as in training
    cores = len(os.sched_getaffinity(0))
    simulated = world.size < ranks and device.type == "cpu"
    threads = max(1, cores // ranks) if simulated else torch.get_num_threads()
    slowdown = max(1.0, ranks / cores) if simulated else 1.0
    identity = [MEASUREMENT_FORMAT, platform.node(), device.type, cores, threads, torch.__version__, world.size]

    lora = [str(profile.lora)] if profile.lora else []
    machine = _cached([*identity, "links"], partial(measure_machine, device, world), world)
    table: dict[int, list[LayerCost]] = {}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with progress_bar(len(sizes), "measuring layers", shown=world.rank == 0) as bar:
            for size in sorted(sizes):
                if not table or max(cost.forward + cost.backward for cost in table[max(table)]) < MAX_SECONDS:
                    key = [*identity, to_document(profile.config), size, precision, *lora]
                    work = partial(_measure_layers, profile, size, precision, device, world)
                    table[size] = [LayerCost(**cost) for cost in _cached(key, work, world)]
                bar.update(1)
    finally:
        torch.set_num_threads(before)

    def cost_model(microbatch: int) -> list[LayerCost]:
        nearest = max((size for size in table if size <= microbatch), default=min(table))
        return [_scaled(cost, slowdown, microbatch / nearest) for cost in table[nearest]]

    return _hardware(machine, device, world.local_size if world.size == ranks else ranks), cost_model


def _hardware(machine: dict[str, Any], device: torch.device, local_ranks: int) -> Hardware:
    """The description of this machine, with the least memory of all ranks (collective)."""
    memory = torch.tensor(device_memory(device, local_ranks), dtype=torch.float64)
    dist.all_reduce(memory, dist.ReduceOp.MIN)  # every rank must find the same plan
    links = {name: Link(**machine["links"][name]) for name in OPERATIONS}
    return Hardware(
        name=f"this machine ({platform.node()})",
        memory=float(memory),
        memory_bandwidth=machine["memory_bandwidth"],
        flops={},
        seconds_per_layer=0.0,
        ranks_per_node=local_ranks,
        inside=links,
        between=links,
        overlaps_collectives=device.type != "cpu",
    )


def _scaled(cost: LayerCost, slowdown: float, size: float) -> LayerCost:
    """The cost of a micro-batch that is `size` times as large, on a machine that is `slowdown` times as slow."""
    return LayerCost(
        forward=cost.forward * slowdown * size,
        backward_input=cost.backward_input * slowdown * size,
        backward_weight=cost.backward_weight * slowdown * size,
        backward=cost.backward * slowdown * size,
        saved_for_backward=int(cost.saved_for_backward * size),
        saved_for_weight_grad=int(cost.saved_for_weight_grad * size),
        workspace=int(cost.workspace * size),
        optimizer=cost.optimizer * slowdown,
    )


def device_memory(device: torch.device, ranks: int) -> float:
    """Bytes of memory available to each of a machine's `ranks` ranks.

    On CUDA, this is the free memory with what this process's allocator has reserved. Contexts and other programs occupy
    the rest of the total.
    """
    if device.type == "cuda":
        available = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
        return available / -(-ranks // torch.cuda.device_count())
    return available_memory() / ranks


def _cached(key: list[Any], measure: Callable[[], Any], world: World) -> Any:
    """Read a result from the user's cache, or measure it on all ranks and let rank 0 store it (collective)."""
    path = cache_folder() / "planner" / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()}.json"
    box: list[Any] = [None]
    if world.rank == 0:
        with suppress(OSError, ValueError):  # no file, or a damaged one
            box = [json.loads(path.read_text())]
    dist.broadcast_object_list(box, src=0)
    if box[0] is not None:
        return box[0]
    box = [measure()]
    dist.broadcast_object_list(box, src=0)
    if world.rank == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{uuid.uuid4().hex}")
        temporary.write_text(json.dumps(box[0]))
        temporary.rename(path)
    return box[0]


def _measure_layers(
    profile: ModelProfile, size: int, precision: str, device: torch.device, world: World
) -> list[dict[str, float]]:
    """The cost of each kind of layer, as the mean over ranks, which measure at the same time (collective)."""
    dtype, autocast = parameter_dtype(precision), AUTOCAST_DTYPES.get(precision)
    measured = [_measure_layer(profile, kind, size, dtype, autocast, device) for kind in range(len(profile.kinds))]
    values = torch.tensor([list(cost.values()) for cost in measured], dtype=torch.float64)
    dist.all_reduce(values)
    return [dict(zip(measured[0], row, strict=True)) for row in (values / world.size).tolist()]


def _measure_layer(
    profile: ModelProfile, kind: int, size: int, dtype: torch.dtype, autocast: torch.dtype | None, device: torch.device
) -> dict[str, float]:
    """Time a stage that consists of one layer; the stage of the head computes the loss as well."""
    dist.barrier()
    config = profile.config
    layer = _initialised(profile.kinds[kind].layer, dtype, device)
    layers = DeviceLayers([layer], autocast)
    stage = Stage(layers, device)
    is_first, is_last = kind == profile.layers[0], kind == profile.layers[-1]
    rows = Rows(*np.random.default_rng(0).integers(config.vocab_size, size=(2, size * IN_FLIGHT, config.seq_len)))
    split = BatchSplit(size, 1, 0, profile.width, device)
    timed = _Timer(device)

    def forward(i: int) -> Tensor:
        batch = batches[i]
        y = stage.forward(i, batch.inputs.to(device) if is_first else hidden[i], batch.context)
        if not is_last:
            return torch.ones_like(y)
        loss, _ = microbatch_loss(y, batch.context)
        return torch.autograd.grad(loss, y)[0]

    with cast_weights(layers.modules()):
        for repeat in range(REPEATS + 1):
            batches = split.batch(lambda _, count: rows, 0, size * IN_FLIGHT, dropout_seed=1).microbatches
            hidden = [torch.randn(*batch.boundary, dtype=dtype, device=device) for batch in batches]
            for split_backward in (True, False):
                gradients = [timed("forward", forward, i) for i in range(IN_FLIGHT)]
                for i, gradient in enumerate(gradients):
                    if split_backward:
                        timed("backward_input", stage.backward_input, i, gradient)
                        timed("backward_weight", stage.backward_weight, i)
                    else:
                        timed("backward", stage.backward, i, gradient)
            if repeat == 0:  # warm-up
                timed.seconds.clear()
        x = batches[0].inputs.to(device) if is_first else hidden[0].requires_grad_()
        saved_for_backward, saved_for_weight_grad = measure_saved_bytes(layers, x, batches[0].context)
    return {
        **{name: statistics.median(timed.seconds[name]) for name in PASSES},
        "saved_for_backward": saved_for_backward,
        "saved_for_weight_grad": saved_for_weight_grad,
        "optimizer": _measure_optimizer(layers),
        "workspace": logits_bytes(profile, size, device.type) if is_last else 0,
    }


class _Timer:
    """Calls functions and records how long each call takes on the device, in seconds, by a name."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def __call__(self, name: str, work: Callable[..., Any], *arguments: Any) -> Any:
        synchronize(self.device)
        started = time.perf_counter()
        result = work(*arguments)
        synchronize(self.device)
        self.seconds[name].append(time.perf_counter() - started)
        return result


def _initialised(layer: nn.Module, dtype: torch.dtype, device: torch.device) -> nn.Module:
    layer = copy.deepcopy(layer).to_empty(device=device)
    initialise(layer, "layers.0", 0)
    return layer.to(dtype)


def _measure_optimizer(layers: DeviceLayers) -> float:
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
