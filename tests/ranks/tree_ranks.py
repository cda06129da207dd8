"""Sums over numbered micro-batches, on each rank of a test."""

import torch
import torch.distributed as dist

from pipeline.gathered_tensors import GatheredTensors
from pipeline.owned_tensors import share_owned
from pipeline.tree_sum import TreeSum, all_reduce, leaves_of, nodes_by_rank, reduce_scatter


def sums(cases: list[tuple[int, int]]) -> list[list[float]]:
    """For each (leaves, size), the sum over all ranks of random tensors [size], of which each rank adds its own."""
    group = dist.group.WORLD
    assert group is not None
    ranks, rank, results = dist.get_world_size(), dist.get_rank(), []
    for leaves, size in cases:
        values = torch.randn(leaves, size, generator=torch.Generator().manual_seed(leaves)) * 1000.0
        padded = torch.nn.functional.pad(values, (0, -size % ranks))
        tree = TreeSum(leaves)
        for leaf in leaves_of(rank, ranks, leaves):
            tree.add(range(leaf, leaf + 1), [padded[leaf].clone()])
        result = torch.empty(padded.shape[1])
        own = [tree.sums[node][0] for node in nodes_by_rank(ranks, leaves)[rank]]
        all_reduce(own, leaves, result, group)
        results.append(result[:size].tolist())
        sizes = [0] * ranks
        sizes[rank_of_rest := leaves % ranks] = padded.shape[1]
        sizes[(rank_of_rest + 1) % ranks] = taken = padded.shape[1] // 3
        sizes[rank_of_rest] -= taken
        part = reduce_scatter(own, leaves, sizes, result, group)
        assert torch.equal(part, result.split(sizes)[rank])
    return results


def shared(sizes: list[int], owners: list[int]) -> list[list[float]]:
    """Tensors of these sizes, which have the values 0, 1, 2, … on their owners and −1 elsewhere, after the exchange."""
    group, rank = dist.group.WORLD, dist.get_rank()
    assert group is not None
    tensors = [
        torch.arange(size, dtype=torch.float64) if owner == rank else torch.full((size,), -1.0, dtype=torch.float64)
        for size, owner in zip(sizes, owners, strict=True)
    ]
    share_owned(tensors, owners, group)
    return [tensor.tolist() for tensor in tensors]


def gathered(sizes: list[int], owners: list[int]) -> tuple[list[list[bool]], list[float]]:
    """Products with tensors of these sizes, gathered for the forward and again for the backward.

    Returns for each phase which tensors have memory, and the gradients of their factors.
    """
    group = dist.group.WORLD
    assert group is not None
    weights = [torch.nn.Parameter(torch.arange(1.0, size + 1)) for size in sizes]
    expanded = torch.nn.Parameter(weights[0].detach().expand(2, sizes[0]))
    tensors = GatheredTensors([[weights[0], expanded], *([weight] for weight in weights[1:])], owners, group)
    phases = [_have_memory(weights)]
    factor = torch.ones((), requires_grad=True)
    tensors.gather()
    tensors.gather()  # by another layer
    tensors.release()
    phases.append(_have_memory(weights))
    loss = sum(((factor * weight * weight).sum() for weight in weights), start=(factor * expanded).sum())
    tensors.release()
    phases.append(_have_memory(weights))
    tensors.gather()
    loss.backward()
    tensors.release()
    assert expanded.grad is not None
    return phases, [float(factor.grad), *(float(w.grad.sum()) for w in weights), float(expanded.grad.sum())]


def _have_memory(tensors: list[torch.nn.Parameter]) -> list[bool]:
    return [tensor.untyped_storage().nbytes() > 0 for tensor in tensors]
