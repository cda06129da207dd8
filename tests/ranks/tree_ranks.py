"""Sums over numbered micro-batches, on each rank of a test."""

import torch
import torch.distributed as dist

from pipeline.tree_sum import TreeSum, all_reduce, leaves_of, nodes_by_rank


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
    return results
