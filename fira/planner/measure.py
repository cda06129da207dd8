"""What layers and links cost on this machine, measured once and kept. With several ranks, all measure together."""

import copy
import hashlib
import json
import math
import os
import platform
import statistics
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fira.data.cache import cache_folder
from fira.devices import AUTOCAST_DTYPES, keep_freed_memory, parameter_dtype
from fira.models.registry import to_document
from fira.nn.init import initialise
from fira.nn.moe.experts import ExpertBank
from fira.optim.adamw import AdamW
from fira.parallel.batch_split import BatchSplit
from fira.parallel.gradients import gradient_of, scale_gradients
from fira.parallel.objective import objective
from fira.parallel.parallelize import ParamShard
from fira.planner.costs import Costs
from fira.planner.device_specs import OPERATIONS, Hardware, Link, Links
from fira.planner.model_profile import Cost, ModelProfile, bytes_kept, working_bytes
from fira.progress_bar import progress_bar
from pipeline.mesh import Layout, make_mesh
from pipeline.mpi import World
from pipeline.stage import DeviceLayers, Stage

FORMAT = 2  # part of every key: raise it when what is measured changes
REPEATS, FLYING = 5, 2  # how often, with how many micro-batches in flight, as in a pipeline
LONG = 2.0  # seconds of one layer's forward and backward from which on larger micro-batches are not measured but scaled
# Between processes of one machine, where there is only one to measure.
SHARED_MEMORY = Link(latency=5e-5, bandwidth=2e9)
SIZES = (2**10, 2**22)  # bytes


def measure(
    profile: ModelProfile, sizes: Sequence[int], precision: str, device: torch.device, ranks: int, world: World
) -> tuple[Hardware, Costs]:
    """This machine as Hardware, and costs of each kind of layer at these micro-batch sizes (collective).

    ranks: to be planned for. Where the world has fewer, this process measures with the threads that one of them would
    have, and ranks that share a core are slower accordingly.
    """
    keep_freed_memory()  # as training does
    cores = len(os.sched_getaffinity(0))
    alone = world.size < ranks and device.type == "cpu"
    threads = max(1, cores // ranks) if alone else torch.get_num_threads()
    slower = max(1.0, ranks / cores) if alone else 1.0
    identity = [FORMAT, platform.node(), device.type, cores, threads, torch.__version__, world.size]

    hardware = _remembered([*identity, "links"], partial(_machine, device, world), world)
    table: dict[int, list[Cost]] = {}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with progress_bar(len(sizes), "measuring layers", shown=world.rank == 0) as bar:
            for size in sorted(sizes):
                if not table or max(cost.forward + cost.backward for cost in table[max(table)]) < LONG:
                    key = [*identity, to_document(profile.config), size, precision]
                    measured = _remembered(key, partial(_layers, profile, size, precision, device, world), world)
                    table[size] = [Cost(**cost) for cost in measured]
                bar.update(1)
    finally:
        torch.set_num_threads(before)

    def costs(microbatch: int) -> list[Cost]:
        nearest = max((size for size in table if size <= microbatch), default=min(table))
        return [_scaled(cost, slower, microbatch / nearest) for cost in table[nearest]]

    link = {name: Link(**hardware["links"][name]) for name in OPERATIONS}
    return _hardware(hardware, link, device, world.local_size if world.size == ranks else ranks), costs


def _hardware(values: dict[str, Any], links: Links, device: torch.device, local_ranks: int) -> Hardware:
    return Hardware(
        name=f"this machine ({platform.node()})",
        memory=memory_of(device, local_ranks),
        memory_bandwidth=values["memory_bandwidth"],
        flops={},
        seconds_per_layer=0.0,
        ranks_per_node=local_ranks,
        inside=links,
        between=links,
    )


def _scaled(cost: Cost, slower: float, size: float) -> Cost:
    values = {name: value * slower * size for name, value in asdict(cost).items()}
    return Cost(
        **{
            **values,
            "kept": int(cost.kept * size),
            "noted": int(cost.noted * size),
            "working": int(cost.working * size),
            "optimizer": cost.optimizer * slower,
        }
    )


def memory_of(device: torch.device, ranks: int) -> float:
    """Bytes of memory that each of a machine's `ranks` ranks has."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / -(-ranks // torch.cuda.device_count())
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container
    given = limit.read_text().strip() if limit.exists() else "max"
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return (physical if given == "max" else min(physical, int(given))) / ranks


def _remembered(key: list[Any], make: Callable[[], Any], world: World) -> Any:
    """A result from the user's cache, or made by all ranks and kept by the first (collective)."""
    path = cache_folder() / "planner" / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()}.json"
    box = [json.loads(path.read_text()) if world.rank == 0 and path.exists() else None]
    dist.broadcast_object_list(box, src=0)
    if box[0] is not None:
        return box[0]
    box = [make()]
    dist.broadcast_object_list(box, src=0)
    if world.rank == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(f".{uuid.uuid4().hex}")
        aside.write_text(json.dumps(box[0]))
        aside.rename(path)
    return box[0]


def _layers(
    profile: ModelProfile, size: int, precision: str, device: torch.device, world: World
) -> list[dict[str, float]]:
    """Costs of each kind of layer, means over ranks that measure at the same time."""
    dtype = parameter_dtype(precision)
    found = [
        _layer(profile, kind, size, dtype, AUTOCAST_DTYPES.get(precision), device) for kind in range(len(profile.kinds))
    ]
    values = torch.tensor([list(cost.values()) for cost in found], dtype=torch.float64)
    dist.all_reduce(values)
    return [dict(zip(found[0], row, strict=True)) for row in (values / world.size).tolist()]


def _layer(
    profile: ModelProfile, kind: int, size: int, dtype: torch.dtype, autocast: torch.dtype | None, device: torch.device
) -> dict[str, float]:
    """Time a layer as a stage of its own; the one of the head gives the loss as well."""
    dist.barrier()
    config = profile.config
    layer = _filled(profile.kinds[kind].layer, dtype, device)
    layers = DeviceLayers([layer], autocast)
    stage = Stage(layers, device)
    first, last = kind == profile.layers[0], kind == profile.layers[-1]
    numbers = np.random.default_rng(0).integers(config.vocab_size, size=(2, size * FLYING, config.seq_len))
    split = BatchSplit(size, 1, 0, profile.width, device)
    seconds: dict[str, list[float]] = {name: [] for name in ("forward", "input", "weight", "backward")}

    def timed(name: str, work: Callable[..., Any], *arguments: Any) -> Any:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        result = work(*arguments)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds[name].append(time.perf_counter() - started)
        return result

    def forward(i: int) -> Tensor:
        batch = batches[i]
        y = stage.forward(i, batch.inputs.to(device) if first else hidden[i], batch.context)
        if not last:
            return torch.ones_like(y)
        loss, _ = objective(y, batch.context)
        return torch.autograd.grad(loss, y)[0]

    for repeat in range(REPEATS + 1):
        batches = split.microbatches(lambda a, n: (numbers[0][:n], numbers[1][:n]), 0, size * FLYING, dropout_seed=1)
        hidden = [torch.randn(*batch.boundary, dtype=dtype, device=device) for batch in batches]
        for halves in (True, False):
            gradients = [timed("forward", forward, i) for i in range(FLYING)]
            for i, gradient in enumerate(gradients):
                if halves:
                    timed("input", stage.backward_input, i, gradient)
                    timed("weight", stage.backward_weight, i)
                else:
                    timed("backward", stage.backward, i, gradient)
        if repeat == 0:  # warms up
            for times in seconds.values():
                times.clear()
    x = batches[0].inputs.to(device) if first else hidden[0].requires_grad_()
    kept, noted = bytes_kept(layers, x, batches[0].context)
    working = working_bytes(profile, size, device.type) if last else 0
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {**medians, "kept": kept, "noted": noted, "optimizer": _optimizer(layer), "working": working}


def _filled(layer: nn.Module, dtype: torch.dtype, device: torch.device) -> nn.Module:
    layer = copy.deepcopy(layer).to_empty(device=device)
    initialise(layer, "layers.0", 0)
    return layer.to(dtype)


def _optimizer(layer: nn.Module) -> float:
    """Seconds of what is done with gradients once a step: norm, clipping, update."""
    of_experts = {p for bank in layer.modules() if isinstance(bank, ExpertBank) for p in bank.parameters(recurse=False)}
    parts = [ParamShard(name, p, 0, tuple(p.shape), p in of_experts) for name, p in layer.named_parameters()]
    optimizer = AdamW(dict(layer.named_parameters()), {part.name for part in parts if part.is_matrix}, 0.1)
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        for part in parts:
            torch.linalg.vector_norm(gradient_of(part).flatten(), dtype=torch.float64)
        scale_gradients(parts, 0.99)
        optimizer.step(0.0)
        if parts[0].parameter.is_cuda:
            torch.cuda.synchronize(parts[0].parameter.device)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def _machine(device: torch.device, world: World) -> dict[str, Any]:
    """Memory bandwidth, and links between all ranks of the world."""
    a, b = torch.empty(2, 2**24, device=device)
    copying = _median(lambda: a.copy_(b), device)
    links = {name: asdict(SHARED_MEMORY) for name in OPERATIONS}
    if world.size > 1:
        group = make_mesh(Layout(1, world.size, 1), [device]).groups["dp"]
        hops = {"p2p": 2, "all_to_all": 1, "all_reduce": 2 * math.ceil(math.log2(world.size))}
        shares = {"p2p": 2.0, "all_to_all": 1 - 1 / world.size, "all_reduce": 2 - 2 / world.size}
        for name in OPERATIONS:
            small, large = (_median(_operation(name, size, device, world, group), device) for size in SIZES)
            bandwidth = shares[name] * (SIZES[1] - SIZES[0]) / max(large - small, 1e-9)
            links[name] = asdict(Link(small / hops[name], bandwidth))
    return {"memory_bandwidth": 2 * a.nbytes / copying, "links": links}


def _operation(name: str, size: int, device: torch.device, world: World, group: dist.ProcessGroup) -> Callable[[], Any]:
    """A message of `size` bytes from rank 0 to rank 1 and back, or a collective of all ranks."""
    x, y = torch.zeros(2, size // 4 // world.size * world.size, device=device)
    if name == "all_reduce":
        return lambda: dist.all_reduce(x, group=group)
    if name == "all_to_all":
        return lambda: dist.all_to_all_single(y, x, group=group)

    def there_and_back() -> None:
        if world.rank == 0:
            dist.send(x, 1, group=group)
            dist.recv(x, 1, group=group)
        elif world.rank == 1:
            dist.recv(x, 0, group=group)
            dist.send(x, 0, group=group)

    return there_and_back


def _median(work: Callable[[], Any], device: torch.device) -> float:
    times = []
    for _ in range(4 * REPEATS):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times)
