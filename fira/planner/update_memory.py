"""The memory of a rank after the passes of a step: in the reduction of its gradients, and in the update.

reduction   sums of gradients, freed bucket by bucket; a bucket in one tensor, what is received of it, its result
update      gradients; the matrices that Muon orthogonalises, with temporary tensors
"""

from functools import cache

import torch

from fira.parallel.gradient_sum import buckets
from fira.planner.candidate_costs import CandidateCosts
from fira.planner.model_profile import TrainedParameter
from fira.planner.step_memory import layer_gradients, stored_sums
from pipeline.owned_tensors import LIMIT


def reduction_peak(costs: CandidateCosts, rank: int) -> float:
    """The largest number of bytes that a rank allocates in the reduction over its replicas, see `GradientSum`."""
    if costs.hardware.overlaps_collectives or costs.candidate.shard == "parameters":
        return 0.0
    layout, count = costs.layout, stored_sums(costs.candidate.count, costs.layout.dp)[-1]
    now = peak = count * sum(layer_gradients(costs, i) for i in costs.rank_layers[rank])
    trained = [p for i in costs.rank_layers[rank] for p in costs.layer_kinds[i].trained]
    for expert, replicas, sources in ((False, layout.dp, 1), (True, layout.dp // layout.ep, layout.ep)):
        sizes = tuple(p.size // sources for p in trained if p.expert == expert)
        if replicas == 1:
            now -= costs.element_size * sum(sizes) * (sources - 1)
            continue
        for size, is_single in reversed(_buckets(sizes, costs.element_size)):
            stored = count * size * sources
            result = size / replicas if costs.candidate.shard else size
            flat = 0 if is_single and not costs.candidate.shard else count * size
            peak = max(peak, now + flat, now + flat + size + result - (stored if flat else 0))
            now += result - stored
    return float(peak)


@cache
def _buckets(sizes: tuple[int, ...], element_size: int) -> list[tuple[int, bool]]:
    """The bytes of each bucket of gradients with these numbers of elements, and whether it has one tensor."""
    dtype = torch.float64 if element_size == 8 else torch.float32
    tensors = [torch.empty(size, dtype=dtype, device="meta") for size in sizes]
    return [(sum(t.nbytes for t in tensors[span]), span.stop - span.start == 1) for span in buckets(tensors)]


def update_peak(costs: CandidateCosts, rank: int, owned: float) -> float:
    """The largest number of bytes that a rank allocates in the update. owned: bytes of the gradients that it has."""
    layout, sharded = costs.layout, bool(costs.candidate.shard)
    hidden = [p for i in costs.rank_layers[rank] for p in costs.layer_kinds[i].hidden]
    temporary = 0.0
    for expert, replicas, parts in ((False, layout.dp, 1), (True, layout.dp // layout.ep, layout.ep)):
        group = [p for p in hidden if p.expert == expert]
        elements = sum(p.size for p in group) / parts
        work = _orthogonalization(costs, group, elements / replicas)
        if replicas > 1 and not sharded and group:
            chunk = max(min(LIMIT / costs.element_size, elements / replicas), max(p.shape[-2:].numel() for p in group))
            work = elements + max(work, (replicas + 1) * chunk)
        temporary = max(temporary, costs.element_size * work)
    if costs.candidate.shard == "optimizer" and layout.dp > 1:
        largest = max((p.size for i in costs.rank_layers[rank] for p in costs.layer_kinds[i].trained), default=0)
        chunk = max(min(LIMIT, owned), costs.element_size * largest)
        temporary = max(temporary, (layout.dp + 1) * chunk)
    return owned + temporary


def _orthogonalization(costs: CandidateCosts, matrices: list[TrainedParameter], owned: float) -> float:
    """Elements of the tensors with which a rank orthogonalises matrices, see `fira/optim/newton_schulz.py`.

    owned: elements of the results, all of which several threads of a CPU compute before the first one is used.
    """
    threads = 1 if costs.hardware.overlaps_collectives else torch.get_num_threads()
    sizes = [p.shape[-2:] if not costs.hardware.overlaps_collectives else p.shape for p in matrices]
    largest = max((3 * shape.numel() + 2 * shape[:-2].numel() * min(shape[-2:]) ** 2 for shape in sizes), default=0)
    return threads * largest + (owned if threads > 1 else 0)
