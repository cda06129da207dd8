"""The best ways to train a model on so many ranks.

Ways are tried in the order of the least time that any schedule could take with their stages, a formula; the search
ends when that alone is more than the best ways found take, so what it returns is what trying all of them would. A way
that does not fit into memory is tried once more, with as few blocks recomputed as are needed.
"""

import heapq
import math
from dataclasses import dataclass

from fira.errors import UserError
from fira.planning.costs import Costs
from fira.planning.hardware import Hardware
from fira.planning.layers import Shape
from fira.planning.predict import Estimate, Predictor
from fira.planning.ways import Wanted, ways


@dataclass(frozen=True)
class Found:
    """The best ways, the fastest first; how many there are, and how many would be faster but do not fit."""

    best: list[Estimate]
    ways: int
    too_large: int


def search(
    shape: Shape, ranks: int, wanted: Wanted, hardware: Hardware, costs: Costs, precision: str, most: int = 10
) -> Found:
    """The `most` fastest ways that fit into memory. UserError where none is legal, or none fits."""
    predictor = Predictor(shape, hardware, costs, precision)
    every = list(ways(shape, ranks, wanted))
    if not every:
        raise UserError(
            f"no layout of {ranks} ranks for {len(shape.layers)} layers, {shape.num_experts} experts and "
            f"{wanted.batch} sequences a batch keeps what is given; leave out a flag, or give a larger --batch-size"
        )
    queue = [(predictor.least_seconds(way), number) for number, way in enumerate(every)]
    heapq.heapify(queue)
    count = len(every)
    found: list[Estimate] = []
    smallest, too_large = math.inf, 0
    while queue:
        least, number = heapq.heappop(queue)
        if len(found) >= most and least >= found[-1].seconds:
            break
        way = every[number]
        memory = predictor.memory(way)
        if max(memory) > hardware.memory and wanted.recompute is None and not way.recompute:
            every.append(predictor.sparing(way))
            heapq.heappush(queue, (predictor.least_seconds(every[-1]), len(every) - 1))
            continue
        smallest = min(smallest, max(memory))
        if max(memory) > hardware.memory:
            too_large += not found
            continue
        found = sorted([*found, predictor.predict(way, memory)], key=_order)[:most]
    if not found:
        raise UserError(
            f"the model does not fit: the smallest of {count} ways needs {smallest / 1e9:.1f} GB on a rank, "
            f"{hardware.name} has {hardware.memory / 1e9:.1f}; take more --ranks or a smaller model"
        )
    return Found(found, count, too_large)


def _order(estimate: Estimate) -> tuple[float, float]:
    """The fastest first; of those as fast, to a millionth, the one that needs the least memory."""
    return float(f"{estimate.seconds:.6g}"), max(estimate.memory)
