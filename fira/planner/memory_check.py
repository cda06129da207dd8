"""Refuse a run that does not fit into memory before anything is allocated.

    need of a rank     rank_memory + tokens of its part of the global batch + on a CPU, the copy that is saved
    available memory   shared by the ranks of a machine, or of a control group

The activations of a block are about as many numbers as `_features`, the widths of its products, for every token. Half
of them is a lower bound and 2.25 times them an upper bound, which take milliseconds and decide most runs. The planner
estimates the activations only where the available memory is below the upper bound, because this takes about a second.
"""

import platform
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from fira.errors import UserError
from fira.host_memory import own_group
from fira.nn.moe.layer import MoE
from fira.parallel.parallelize import EVERY_BLOCK
from fira.planner.best_candidates import memory_only
from fira.planner.candidate_costs import CandidateCosts, PlanInputs
from fira.planner.candidates import Candidate
from fira.planner.costs import LayerCost, copy_size, element_size, roofline_costs
from fira.planner.measure import device_memory
from fira.planner.memory import rank_memory
from fira.planner.model_profile import LayerKind, ModelProfile, logits_bytes
from fira.planner.tensor_memory import LayerMemory

LEAST, MOST = 0.5, 2.25  # activations of a block in units of its features; 0.9 to 2.0 by the planner's estimates
OVERESTIMATE = 1.05  # the largest error that is expected; docs/planner.md reports 1 %, but not for every family
TOKEN_BYTES = 16  # of a token of the batch and its target

Needs = Callable[[Candidate], list[float]]  # candidate → bytes of each rank of the pipeline


@dataclass(frozen=True)
class SharedMemory:
    """available: bytes. ranks: the pipeline rank of each rank that uses this memory."""

    available: float
    ranks: list[int]

    def holds(self, needs: Sequence[float]) -> bool:
        return sum(needs[rank] for rank in self.ranks) <= self.available


def check_memory(
    name: str, profile: ModelProfile, candidate: Candidate, precision: str, devices: Sequence[torch.device]
) -> None:
    """Raise UserError if the ranks of a machine need more memory than it has (collective).

    name: of the model, for the message. devices: of this rank. On CUDA only the lower bound is compared, because
    another implementation of attention may need less memory than the planner's estimate.
    """
    memories = _memories(candidate, devices)

    def fits(needs: Needs) -> Callable[[Candidate], bool]:
        return lambda candidate: all(memory.holds(needs(candidate)) for memory in memories)

    on_cpu = devices[0].type == "cpu"
    least, most = (_bounded_needs(profile, precision, devices[0].type, bound) for bound in (LEAST, MOST))
    if fits(most if on_cpu else least)(candidate):
        return
    needs, safe = least, _estimated_needs(profile, precision) if on_cpu else most
    if fits(least)(candidate):  # on a CPU

        def needs(candidate: Candidate) -> list[float]:
            return [need / OVERESTIMATE for need in safe(candidate)]

        if fits(needs)(candidate):
            return
    memory = next(memory for memory in memories if not memory.holds(needs(candidate)))
    required = sum(needs(candidate)[rank] for rank in memory.ranks) / len(memory.ranks)
    raise UserError(
        f"{name} needs about {required / 1e9:,.1f} GB per rank, {memory.available / len(memory.ranks) / 1e9:,.1f} GB "
        f"available; try {_remedy(candidate, fits(safe), required * len(memory.ranks) / memory.available)}"
    )


def _memories(candidate: Candidate, devices: Sequence[torch.device]) -> list[SharedMemory]:
    """The memories of all ranks (collective). Ranks of a machine share one, unless they have control groups or GPUs."""
    rank, device = dist.get_rank(), devices[0]
    owner = f"{platform.node()} {own_group()} {own_group('memory')}" if device.type == "cpu" else str(rank)
    entries: list[tuple[str, float]] = [("", 0.0)] * dist.get_world_size()
    dist.all_gather_object(entries, (owner, len(set(devices)) * device_memory(device, 1)))
    ranks: dict[str, list[int]] = defaultdict(list)
    available: dict[str, float] = {}
    for other, (owner, memory) in enumerate(entries):
        ranks[owner].append(other // candidate.layout.dp)
        available[owner] = max(memory, available.get(owner, 0.0))
    return [SharedMemory(available[owner], ranks[owner]) for owner in ranks]


def _bounded_needs(profile: ModelProfile, precision: str, device: str, bound: float) -> Needs:
    """Needs with `bound` numbers per feature of a block; only the upper bound counts what the head keeps."""
    itemsize = min(element_size(precision), copy_size(precision) or 8) if bound < 1 else element_size(precision)

    def memory(kind: int, microbatch: int) -> LayerMemory:
        tokens, layer = microbatch * profile.tokens, profile.kinds[kind]
        saved, logits = bound * itemsize * tokens * _features(layer), 0.0
        is_block = kind not in (profile.layers[0], profile.layers[-1])
        if bound < 1:
            return LayerMemory(saved if is_block else 0.0)
        if not is_block:
            saved = 2.0 * itemsize * (tokens * profile.width + layer.parameters)
        if kind == profile.layers[-1]:
            logits = 2.0 * logits_bytes(profile, microbatch, device)
        backward = saved + 2.0 * itemsize * (layer.parameters + layer.expert_parameters)
        return LayerMemory(saved, saved, 2 * saved + logits, backward, backward, backward)

    def costs_of(microbatch: int) -> list[LayerCost]:
        memories = [memory(kind, microbatch) for kind in range(len(profile.kinds))]
        return [LayerCost(0.0, 0.0, 0.0, 0.0, 0.0, memory=memory) for memory in memories]

    def needs(candidate: Candidate) -> list[float]:
        hardware = memory_only(0.0, precision, 1, device)
        inputs = PlanInputs(profile, hardware, costs_of, precision)
        return _needs(CandidateCosts(inputs, candidate), device)

    return needs


def _estimated_needs(profile: ModelProfile, precision: str) -> Needs:
    """Needs by the planner's estimate of activations on a CPU."""
    hardware = memory_only(0.0, precision, 1, "cpu")
    inputs = PlanInputs(profile, hardware, roofline_costs(profile, hardware, precision, "cpu"), precision)
    return lambda candidate: _needs(CandidateCosts(inputs, candidate), "cpu")


def _needs(costs: CandidateCosts, device: str) -> list[float]:
    """The need of each rank of the pipeline, as defined at the top of this file."""
    batch = costs.candidate.count * costs.candidate.microbatch * costs.profile.tokens
    copies = [_saved_copy(costs, rank) if device == "cpu" else 0.0 for rank in range(costs.layout.pp)]
    return [memory + TOKEN_BYTES * batch + copy for memory, copy in zip(rank_memory(costs), copies, strict=True)]


def _saved_copy(costs: CandidateCosts, rank: int) -> float:
    """Bytes of the copy from which a checkpoint is written in the background. Replicas save different rows."""
    return costs.element_size * sum(p.size + p.moments for p in costs.updated(rank)) / costs.layout.dp


def _features(kind: LayerKind) -> float:
    """Widths of inputs and outputs of the products that a layer computes for a token, summed."""
    moe = [module for module in kind.layer.modules() if isinstance(module, MoE)]
    rows = kind.top_k * min([1.0, *(module.capacity_factor or 1.0 for module in moe)])
    # Adapters save their inputs, which their base layers save as well, and vectors of their small rank.
    shapes = [p.shape for name, p in kind.layer.named_parameters() if ".lora" not in name]
    return sum(sum(shape[-2:]) * (rows if len(shape) == 3 else 1.0) for shape in shapes if len(shape) > 1)


def _remedy(candidate: Candidate, fits: Callable[[Candidate], bool], machines: float) -> str:
    """The flags of the largest micro-batch that fits, else of the largest batch, else the number of machines."""
    dp, batch = candidate.layout.dp, candidate.count * candidate.microbatch * candidate.layout.dp

    def changed(microbatch: int, batch: int, recompute: int) -> Candidate:
        count = -(-batch // (microbatch * dp))
        return replace(candidate, microbatch=microbatch, count=count, recompute=recompute)

    for shard in ("optimizer", "parameters") if dp > 1 else ():
        if fits(replace(candidate, shard=shard)):
            return f"--shard {shard}"
    for recompute, flag in ((candidate.recompute, ""), (EVERY_BLOCK, " --recompute full")):
        for size in _powers_of_two(candidate.microbatch):
            if fits(changed(size, batch, recompute)):
                return f"--micro-batch-size {size}{flag}"
    for size in _powers_of_two(batch):
        if fits(changed(1, size, EVERY_BLOCK)):
            return f"--batch-size {size} --micro-batch-size 1 --recompute full"
    return f"at least {int(machines) + 1:,} times as many machines with more --pp or --ep, or a smaller model"


def _powers_of_two(largest: int) -> list[int]:
    """In descending order. All are tried, because memory need not grow with the size: fewer sequences in a micro-batch
    are more micro-batches, whose gradients have more partial sums."""
    return [2**n for n in reversed(range(largest.bit_length()))]
