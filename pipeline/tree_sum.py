"""Sums over numbered micro-batches, in an order that does not depend on which rank computes which micro-batch.

Floating-point addition is not associative, so a sum depends on its order. Here m terms, the leaves, are summed in a
binary tree that depends on m only. A node is a range of leaves: with leaf j at j/m in the interval [0, 1), which is
halved again and again, the nodes are the leaves in each of these intervals.

    leaves       0   1   2   3   4   5              m = 6
                  ╲ ╱    │    ╲ ╱    │
                  0–1    │    3–4    │
                     ╲   ╱       ╲   ╱
                      0–2         3–5               dp 2: rank 0 has leaves 0–2, rank 1 has 3–5
                         ╲       ╱
                            0–5                     dp 3: rank 0 has 0–1, rank 1 has 2 and 3, rank 2 has 4 and 5

Each of several ranks has consecutive leaves. It sums the nodes that consist of its own leaves only; the sums of these
nodes are exchanged, and the tree is completed. If the number of ranks is a power of two, each rank has one node.
"""

from collections.abc import Sequence
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor

Node = range  # of leaves


def leaves_of(rank: int, ranks: int, leaves: int) -> range:
    """The leaves of one of several ranks, those in [rank/ranks, (rank + 1)/ranks): at most ⌈leaves / ranks⌉."""
    first, stop = (-(-number * leaves // ranks) for number in (rank, rank + 1))
    return range(first, stop)


@cache
def _relatives(leaves: int) -> dict[Node, tuple[Node, Node]]:
    """Sibling and parent of each node except the root."""
    relatives: dict[Node, tuple[Node, Node]] = {}
    intervals = [(0, 1)] if leaves else []  # (i, n) is the interval [i/n, (i + 1)/n)
    while intervals:
        i, n = intervals.pop()
        parent, left, right = (
            leaves_of(i, n, leaves),
            leaves_of(2 * i, 2 * n, leaves),
            leaves_of(2 * i + 1, 2 * n, leaves),
        )
        if left and right:
            relatives |= {left: (right, parent), right: (left, parent)}
        if len(parent) > 1:
            intervals += [(2 * i, 2 * n), (2 * i + 1, 2 * n)]
    return relatives


class TreeSum:
    """Sum of the tensors of `leaves` leaves, each of which is a list of tensors of the same shapes.

    sums: the complete nodes whose siblings are not complete, with their sums. Of n leaves that are added in ascending
    order there are about log₂ n of them, each of the size of one leaf.
    """

    def __init__(self, leaves: int) -> None:
        self.sums: dict[Node, list[Tensor]] = {}
        self._relatives = _relatives(leaves)

    def add(self, node: Node, tensors: list[Tensor]) -> None:
        """Add the sum of a node, which may be a single leaf. The tensors are overwritten."""
        while node in self._relatives:
            sibling, parent = self._relatives[node]
            if sibling not in self.sums:
                break
            other = self.sums.pop(sibling)
            if tensors:
                torch._foreach_add_(tensors, other)
            node = parent
        self.sums[node] = tensors


@cache
def nodes_by_rank(ranks: int, leaves: int) -> list[list[Node]]:
    """For each rank, the nodes in ascending order that remain after it has added its leaves to a tree."""
    result = []
    for rank in range(ranks):
        tree = TreeSum(leaves)
        for leaf in leaves_of(rank, ranks, leaves):
            tree.add(range(leaf, leaf + 1), [])
        result.append(sorted(tree.sums, key=lambda node: node.start))
    return result


def all_reduce(sums: Sequence[Tensor], leaves: int, result: Tensor, group: dist.ProcessGroup) -> None:
    """Complete a tree over the ranks of a group and write its sum to `result` (collective).

    A reduce-scatter in the order of the tree, then an all-gather: each rank sums a part of the tensors.

    sums: of this rank's nodes in the order of `nodes_by_rank`, each of the shape of `result`: [n], where the size of
    the group divides n.
    """
    ranks = dist.get_world_size(group)
    part = len(result) // ranks
    own = reduce_scatter(sums, leaves, [part] * ranks, result, group)
    dist.all_gather(list(result.split(part)), own, group=group)


def reduce_scatter(
    sums: Sequence[Tensor], leaves: int, sizes: Sequence[int], like: Tensor, group: dist.ProcessGroup
) -> Tensor:
    """Complete a tree over the ranks of a group, and return this rank's part of its sum (collective).

    sums: of this rank's nodes in the order of `nodes_by_rank`, each [n]. sizes: of the parts of all ranks, one after
    another, with the sum n. like: has the dtype and the device of the sums, of which a rank may have none.
    """
    nodes, rank = nodes_by_rank(dist.get_world_size(group), leaves), dist.get_rank(group)
    tree = TreeSum(leaves)
    for i in range(max(map(len, nodes))):  # one node of each rank at a time
        senders = [own[i] for own in nodes if i < len(own)]
        received = like.new_empty(len(senders), sizes[rank])
        sends = i < len(nodes[rank])
        receive_sizes = [sizes[rank] if i < len(own) else 0 for own in nodes]
        send, send_sizes = (sums[i], list(sizes)) if sends else (like.new_empty(0), [0] * len(nodes))
        dist.all_to_all_single(received.view(-1), send, receive_sizes, send_sizes, group=group)
        for node, row in zip(senders, received, strict=True):
            tree.add(node, [row])
    return tree.sums[range(leaves)][0]
