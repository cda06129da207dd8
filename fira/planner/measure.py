"""Measure the costs of layers and links on this machine, and cache them on disk. All ranks measure simultaneously.

measure ─ measure_machine  ─ memory bandwidth and links
        └ _measure_layers  ─ _measure_layer per kind of layer and micro-batch size
"""

import copy
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fira.data.rows import Rows
from fira.devices import AUTOCAST_DTYPES, keep_freed_memory, parameter_dtype
from fira.host_memory import available_memory
from fira.models.registry import to_document
from fira.nn.init import initialise
from fira.parallel.batch_split import BatchSplit
from fira.parallel.cast_weights import cast_weights
from fira.parallel.microbatch_loss import microbatch_loss
from fira.planner.costs import CostModel, LayerCost
from fira.planner.device_specs import OPERATIONS, Hardware, Link
from fira.planner.measure_machine import measure_machine, synchronize
from fira.planner.measure_optimizer import REPEATS, measure_optimizer, measure_orthogonalization
from fira.planner.measurement_cache import cached, machine_identity
from fira.planner.model_profile import ModelProfile
from fira.planner.tensor_memory import LayerMemory, measure_layer_memory
from pipeline.mpi import World
from pipeline.mpi.cores import own_cores
from pipeline.stage import DeviceLayers, Stage

IN_FLIGHT = 2  # micro-batches, as in a pipeline
PASSES = ("forward", "backward_input", "backward_weight", "backward")  # methods of a stage that are timed
MAX_SECONDS = 0.15  # of a layer's forward and backward; costs of larger micro-batches are extrapolated
ENOUGH_SECONDS = 0.3  # of measurements of a layer, after which they are not repeated


def measure(
    profile: ModelProfile, sizes: Sequence[int], precision: str, device: torch.device, ranks: int, world: World
) -> tuple[Hardware, CostModel]:
    """Measure this machine, and the cost of each kind of layer at these micro-batch sizes (collective).

    ranks: the number of ranks to plan for. If the world has fewer, this process measures with as many threads as one
    of them would have, and durations are multiplied by the number of ranks per core.
    """
    keep_freed_memory()  # as in training
    cores = len(own_cores())
    simulated = world.size < ranks and device.type == "cpu"
    before = torch.get_num_threads()
    threads = max(1, cores // ranks) if simulated else before
    slowdown = max(1.0, ranks / cores) if simulated else 1.0

    lora = [str(profile.lora)] if profile.lora else []
    torch.set_num_threads(threads)
    try:
        identity = machine_identity(device, world)
        machine = cached([*identity, "links"], partial(measure_machine, device, world), _machine_of, world)

        def costs(size: int) -> list[LayerCost]:
            key = [*identity, to_document(profile.config), size, precision, profile.optimizer, *lora]
            work = partial(_measure_layers, profile, size, precision, device, world)
            return cached(key, work, _costs_of, world)

        small, *larger = sorted(sizes)
        low = costs(small)
        slowest = max(cost.forward + cost.backward for cost in low) / small
        large = max([small, *larger[:1], *(size for size in larger if slowest * size < MAX_SECONDS)])
        high = costs(large) if large > small else low
    finally:
        torch.set_num_threads(before)

    def cost_model(microbatch: int) -> list[LayerCost]:
        return [_interpolated(a, b, (small, large), microbatch, slowdown) for a, b in zip(low, high, strict=True)]

    return _hardware(machine, device, world.local_size if world.size == ranks else ranks), cost_model


def _machine_of(found: dict[str, Any]) -> tuple[float, dict[str, Link]]:
    """Memory bandwidth and links of a result of `measure_machine`."""
    return float(found["memory_bandwidth"]), {name: Link(**found["links"][name]) for name in OPERATIONS}


def _costs_of(found: list[dict[str, Any]]) -> list[LayerCost]:
    """The costs of a result of `_measure_layers`."""
    return [LayerCost(**cost | {"memory": LayerMemory(*cost["memory"])}) for cost in found]


def _hardware(machine: tuple[float, dict[str, Link]], device: torch.device, local_ranks: int) -> Hardware:
    """The description of this machine, with the least memory of all ranks (collective)."""
    memory_bandwidth, links = machine
    return Hardware(
        name=f"this machine ({platform.node()})",
        memory=least_memory(device, local_ranks),
        memory_bandwidth=memory_bandwidth,
        flops={},
        seconds_per_layer=0.0,
        ranks_per_node=local_ranks,
        inside=links,
        between=links,
        overlaps_collectives=device.type != "cpu",
        cores=min(1.0, len(own_cores()) / local_ranks) if device.type == "cpu" else 1.0,
    )


def _interpolated(small: LayerCost, large: LayerCost, sizes: tuple[int, int], size: int, slowdown: float) -> LayerCost:
    """The cost of a micro-batch of `size` sequences, linear in the size, from those of two `sizes`, if they differ.

    slowdown: factor of the seconds, for a machine that is so many times as slow.
    """

    def value(a: float, b: float) -> float:
        slope = (b - a) / (sizes[1] - sizes[0]) if sizes[1] > sizes[0] else a / sizes[0]
        return max(0.0, a + slope * (size - sizes[0]))

    return LayerCost(
        **{name: value(getattr(small, name), getattr(large, name)) * slowdown for name in PASSES},
        optimizer=small.optimizer * slowdown,
        orthogonalize=small.orthogonalize * slowdown,
        memory=small.memory.map(value, large.memory),
    )


def least_memory(device: torch.device, local_ranks: int) -> float:
    """Bytes of memory available to the rank that has least (collective), so that every rank finds the same plan."""
    memory = torch.tensor(device_memory(device, local_ranks), dtype=torch.float64)
    dist.all_reduce(memory, dist.ReduceOp.MIN)
    return float(memory)


def device_memory(device: torch.device, ranks: int) -> float:
    """Bytes of memory available to each of a machine's `ranks` ranks.

    On CUDA, this is the free memory with what this process's allocator has reserved. Contexts and other programs occupy
    the rest of the total.
    """
    if device.type == "cuda":
        available = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
        return available / -(-ranks // torch.cuda.device_count())
    return available_memory() / ranks


def _measure_layers(
    profile: ModelProfile, size: int, precision: str, device: torch.device, world: World
) -> list[dict[str, Any]]:
    """The cost of each kind of layer, as the mean over ranks, which measure at the same time (collective)."""
    dtype, autocast = parameter_dtype(precision), AUTOCAST_DTYPES.get(precision)
    measured = [_measure_layer(profile, kind, size, dtype, autocast, device) for kind in range(len(profile.kinds))]
    values = torch.tensor([[*seconds.values(), *memory] for seconds, memory in measured], dtype=torch.float64)
    dist.all_reduce(values)
    names = [*measured[0][0]]
    return [
        dict(zip(names, row, strict=False)) | {"memory": row[len(names) :]} for row in (values / world.size).tolist()
    ]


def _measure_layer(
    profile: ModelProfile, kind: int, size: int, dtype: torch.dtype, autocast: torch.dtype | None, device: torch.device
) -> tuple[dict[str, float], LayerMemory]:
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
        started = time.perf_counter()
        for repeat in range(REPEATS + 1):
            if repeat >= 2 and time.perf_counter() - started > ENOUGH_SECONDS:
                break
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
    seconds = {
        **{name: statistics.median(timed.seconds[name]) for name in PASSES},
        "optimizer": measure_optimizer(layers),
        "orthogonalize": measure_orthogonalization(profile.kinds[kind], dtype, autocast, device),
    }
    parameters = [*layers.parameters()]  # not their copies for autocast
    with cast_weights(layers.modules()):
        x = batches[0].inputs.to(device) if is_first else hidden[0].requires_grad_()
        return seconds, measure_layer_memory(layers, x, batches[0].context, parameters)


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
