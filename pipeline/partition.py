"""Cut a list of layers into contiguous stages so that the slowest stage is as fast as it can be."""

from collections.abc import Sequence
from itertools import accumulate, pairwise


def partition(costs: Sequence[float], stages: int) -> list[range]:
    """Contiguous, non-empty ranges of layer indices, one per stage, that minimise the largest sum of costs.

    costs: one non-negative number per layer, embedding and head included. Exact, by dynamic programming over (number
    of stages, number of layers); among equals the one with the smallest sum of squares, so spare room is spread evenly.
    Raises ValueError when there are fewer layers than stages.
    """
    layers = len(costs)
    if not 1 <= stages <= layers:
        raise ValueError(f"{layers} layers cannot be cut into {stages} stages; every stage needs a layer")
    total = [0.0, *accumulate(costs)]

    # best[n] = (largest stage, sum of squares, cuts) for the first n layers in the number of stages reached so far.
    best: dict[int, tuple[float, float, list[int]]] = {0: (0.0, 0.0, [0])}
    for stage in range(1, stages + 1):
        reachable = range(stage, layers - (stages - stage) + 1)
        best = {
            n: min(
                (max(worst, total[n] - total[m]), squares + (total[n] - total[m]) ** 2, [*cuts, n])
                for m, (worst, squares, cuts) in best.items()
                if m < n
            )
            for n in reachable
        }
    cuts = best[layers][2]
    return [range(a, b) for a, b in pairwise(cuts)]
