"""Simulated steps: schedules for MoE layers with exchange, and a head that is divided over the ranks of the pipeline.

    python -m benchmarks.pipeline.simulated    # prints the tables of README.md and writes simulated.png

F, I and W of all layers of a rank compute for one unit each. The all-to-all of MoE layers makes F and I longer: the
share x of an action is exchange. Two kinds of hardware:

    in line     F │ compute │ exchange │   I │ compute │ exchange │     F and I one after another, as the engine does
    overlapped  pair (F, I) │ compute F + compute I │                  the exchange of one during the products of the
                            │ exchange F + exchange I │                other; the longer of the two rows counts

A pair is a forward that is directly followed by the backward of the rank's other stage. It starts when both have their
messages, and both results are available at its end.

Vocabulary parallelism (Yeung et al. 2024, arXiv 2411.05288) divides embedding and head over the ranks of the pipeline.
Here it is a pipeline of equal stages, without the all-reduces that each micro-batch needs, so that its gain is an upper
bound.
"""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from pipeline.partition import partition
from pipeline.schedule import SCHEDULES, Action, ActionKind, Schedule, dependencies
from pipeline.simulate import simulate

F, B, I, W = ActionKind  # noqa: E741
HERE = Path(__file__).parent
SIZES = [(p, n * p) for p in (2, 4, 8) for n in (1, 2, 4)]  # ranks, micro-batches
SHARES = (0.0, 0.1, 0.2, 0.3, 0.5)  # of exchange in F and I
NAMES = ("1f1b", "interleaved", "zb-h1", "zb-2p", "zb-v", "dualpipev")
LAYERS = 16
HEADS = (0.5, 1, 2, 4, 6)  # in layers
EIGHT_RANKS = ((8, 32), (4, 16), (2, 8))  # 1, 2 and 4 replicas for a batch of 32 micro-batches


def step(name: str, ranks: int, microbatches: int, share: float, overlapped: bool = False) -> float:
    """Length of a step in which F, I and W of a rank compute for one unit each."""
    spec = SCHEDULES[name]
    schedule = spec.builder(ranks, microbatches)
    unit = 1 / spec.stages_per_rank
    compute = {F: unit, I: unit, W: unit, B: 2 * unit}
    exchange = dict.fromkeys((F, I, B), unit * share / (1 - share)) | {W: 0.0}
    if overlapped:
        return overlapped_length(schedule, compute, exchange)
    total = {kind: [compute[kind] + exchange[kind]] * schedule.stages for kind in ActionKind}
    return simulate(schedule, total).length


def overlapped_length(schedule: Schedule, compute: dict[ActionKind, float], exchange: dict[ActionKind, float]) -> float:
    """As `pipeline.simulate.simulate`, with pairs of actions that overlap."""
    remaining = [list(reversed(cells)) for cells in map(pairs, schedule.actions)]
    clock = [0.0] * len(remaining)
    done: dict[Action, float] = {}
    while any(remaining):
        for rank, cells in enumerate(remaining):
            while cells and all(d in done for a in cells[-1] for d in dependencies(a, schedule.stages)):
                cell = cells.pop()
                start = max([clock[rank], *(done[d] for a in cell for d in dependencies(a, schedule.stages))])
                single = [compute[a.kind] + exchange[a.kind] for a in cell]
                together = max(sum(compute[a.kind] for a in cell), sum(exchange[a.kind] for a in cell))
                clock[rank] = start + max(together, *single)
                done |= dict.fromkeys(cell, clock[rank])
    return max(clock)


def pairs(actions: Sequence[Action]) -> list[tuple[Action, ...]]:
    cells: list[tuple[Action, ...]] = []
    for action in actions:
        before = cells[-1] if cells else ()
        if len(before) == 1 and before[0].kind is F and action.kind is I and before[0].stage != action.stage:
            cells[-1] = (*before, action)
        else:
            cells.append((action,))
    return cells


def with_head(ranks: int, microbatches: int, head: float, divided: bool = False) -> float:
    """Length of a step of LAYERS layers and a head under the fastest schedule, in units of a layer's forward.

    divided: whether the head is divided over all ranks; otherwise the planner's partition.
    """
    lengths = []
    for name in NAMES:
        schedule = SCHEDULES[name].builder(ranks, microbatches)
        layers = [*[1.0] * LAYERS, head]
        stages = [sum(layers[i] for i in span) for span in partition(layers, schedule.stages)]
        if divided:
            stages = [sum(layers) / schedule.stages] * schedule.stages
        costs = {kind: [(2 if kind is B else 1) * cost for cost in stages] for kind in ActionKind}
        lengths.append(simulate(schedule, costs).length)
    return min(lengths)


def print_exchange() -> None:
    """Print speeds relative to 1F1B: ZB-V, the fastest with one stage per rank or interleaved, and DualPipeV twice."""
    print("| ranks, micro-batches |", *(f"{100 * share:.0f} % |" for share in SHARES))
    print("|---" * (1 + len(SHARES)) + "|")
    for size in SIZES:
        cells = []
        for share in SHARES:
            *others, zb_v, own = (step("1f1b", *size, share) / step(name, *size, share) for name in NAMES)
            overlapped = step("1f1b", *size, share) / step("dualpipev", *size, share, overlapped=True)
            cells.append(f"{zb_v:.2f} · {max(others):.2f} · **{own:.2f}** · {overlapped:.2f}")
        print(f"| {size[0]}, {size[1]} |", *(f"{cell} |" for cell in cells))


def print_vocabulary() -> None:
    """Print the gain of a divided head over the planner's partition: for the same pipeline, and for any on 8 ranks."""
    print("| ranks of a pipeline, micro-batches |", *(f"{head} |" for head in HEADS))
    print("|---" * (1 + len(HEADS)) + "|")
    for size in SIZES:
        if size[1] > size[0]:
            print(
                f"| {size[0]}, {size[1]} |",
                *(f"{with_head(*size, h) / with_head(*size, h, True):.2f} |" for h in HEADS),
            )
    best = [min(with_head(*size, head) for size in EIGHT_RANKS) for head in HEADS]
    gains = [whole / with_head(*EIGHT_RANKS[0], head, divided=True) for whole, head in zip(best, HEADS, strict=True)]
    print("| 8, 32 against the best of 8, 4 and 2 ranks with replicas |", *(f"{gain:.2f} |" for gain in gains))


def draw() -> None:
    figure, axes = plt.subplots(1, 3, figsize=(14, 4), sharey=True)
    shares = [n / 50 for n in range(26)]
    for ax, (ranks, microbatches) in zip(axes, ((2, 4), (4, 8), (4, 16)), strict=True):
        for number, name in enumerate(NAMES):
            times = [step(name, ranks, microbatches, x) / (3 * microbatches) for x in shares]
            width = 2 if name == "dualpipev" else 1
            ax.plot(shares, times, color=f"C{number}", label=name, linewidth=width)
        times = [step("dualpipev", ranks, microbatches, x, overlapped=True) / (3 * microbatches) for x in shares]
        ax.plot(shares, times, color=f"C{len(NAMES) - 1}", linestyle="--", label="dualpipev, pairs overlapped")
        ideal = [1 + 2 / 3 * x / (1 - x) for x in shares]
        ax.plot(shares, ideal, "k:", linewidth=0.8, label="no bubble")
        ax.set_title(f"{ranks} ranks, {microbatches} micro-batches")
        ax.set_xlabel("share of exchange in F and I")
    axes[0].set_ylabel("step / computation of a rank")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(HERE / "simulated.png", dpi=110)


if __name__ == "__main__":
    print_exchange()
    print_vocabulary()
    draw()
