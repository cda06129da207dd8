"""Partition a list of layers into contiguous stages whose slowest stage is as fast as possible."""

from collections.abc import Sequence
from itertools import accumulate, pairwise


def partition(costs: Sequence[float], stages: int) -> list[range]:
    """Contiguous, non-empty ranges of layer indices, one per stage, that minimise the largest sum of costs.

    costs: one non-negative number per layer, embedding and head included. The result is exact, by dynamic programming
    over the number of stages and of layers. Each step chooses, of the partitions with the same largest sum, the one
    with the smallest sum of squares, which also balances the other stages, and then the one whose boundaries come first
    in lexicographic order.
    Raises ValueError when there are fewer layers than stages.
    """
    layers = len(costs)
    if not 1 <= stages <= layers:
        raise ValueError(f"{layers} layers cannot be partitioned into {stages} stages; every stage needs a layer")
    prefix = [0.0, *accumulate(costs)]

    # best[n]: the best partition of the first n layers into `stage` stages: (largest sum, sum of squares, boundaries)
    best: dict[int, tuple[float, float, list[int]]] = {0: (0.0, 0.0, [0])}
    for stage in range(1, stages + 1):
        ends = range(stage, layers - (stages - stage) + 1)  # leave a layer for every stage that follows
        best = {
            n: min(
                (max(largest, prefix[n] - prefix[m]), squares + (prefix[n] - prefix[m]) ** 2, [*boundaries, n])
                for m, (largest, squares, boundaries) in best.items()
                if m < n
            )
            for n in ends
        }
    return [range(a, b) for a, b in pairwise(best[layers][2])]
