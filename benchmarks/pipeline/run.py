"""Compare this project's engine and schedules with PyTorch's and DeepSpeed's; write a table and a plot.

    python -m benchmarks.pipeline.run [PYTHON]

PYTHON: the interpreter of an environment with DeepSpeed; without it DeepSpeed is not run.
Writes results.csv and results.png to the folder of this file, and prints the table of README.md.
"""

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd

from benchmarks.turns import Job

HERE = Path(__file__).parent
ROUNDS = 5
JOBS = [(2, 4), (4, 8)]  # ranks, micro-batches
OTHERS = ("torch on ours", "torch on gloo", "deepspeed")
COLOURS = {"ours": "tab:blue", "torch on ours": "tab:green", "torch on gloo": "tab:orange", "deepspeed": "tab:red"}


def main() -> None:
    deepspeed = sys.argv[1] if len(sys.argv) > 1 else None
    frame = pd.DataFrame([row for job in JOBS for row in measure(*job, deepspeed)])
    frame.to_csv(HERE / "results.csv", index=False)
    report(frame)


def measure(ranks: int, microbatches: int, deepspeed: str | None) -> Iterator[dict[str, Any]]:
    """Time all contenders in turn; yield one row per round and contender."""
    print(f"{ranks} ranks, {microbatches} micro-batches …", file=sys.stderr, flush=True)
    with ExitStack() as stack:
        jobs = [stack.enter_context(Job(ranks, "benchmarks.pipeline.ranks", microbatches))]
        if deepspeed:
            job = Job(ranks, "benchmarks.pipeline.deepspeed_ranks", microbatches, python=deepspeed)
            jobs.append(stack.enter_context(job))
        turns = [(job, name) for job in jobs for name in job.names]
        for number in range(ROUNDS):
            for job, name in turns[:: -1 if number % 2 else 1]:  # every other round in reverse order
                engine, schedule = name.split(": ")
                row = {"ranks": ranks, "microbatches": microbatches, "contender": engine, "schedule": schedule}
                yield row | {"round": number, "seconds": job.time(name)}


def report(frame: pd.DataFrame) -> None:
    """Print the table and draw the plot. Each ratio is the median of the ratios of the rounds."""
    columns = [
        "ranks, micro-batches",
        "schedule",
        "ms",
        "ideal of 1F1B / ours",
        "× our 1F1B",
        *(f"× {engine}" for engine in OTHERS),
    ]
    print(f"| {' | '.join(columns)} |")
    print("|" + "---|" * 8)
    for (ranks, microbatches), job in frame.groupby(["ranks", "microbatches"]):
        by = {key: part.set_index("round")["seconds"] for key, part in job.groupby(["contender", "schedule"])}
        ideal = by["alone", "stage"] * (microbatches + ranks - 1) / microbatches
        for schedule in (name for engine, name in by if engine == "ours"):
            own = by["ours", schedule]
            cells = [f"{1e3 * own.median():.0f}", ratio(ideal, own), ratio(by["ours", "1f1b"], own)]
            cells += [ratio(by.get((engine, schedule)), own) for engine in OTHERS]
            print(f"| {ranks}, {microbatches} | {schedule} | {' | '.join(cells)} |")
    draw(frame)


def ratio(other: pd.Series | None, own: pd.Series) -> str:
    """Return the median of other / own over the rounds."""
    return "–" if other is None else f"{(other / own).median():.2f}"


def draw(frame: pd.DataFrame) -> None:
    jobs = list(frame.groupby(["ranks", "microbatches"]))
    figure, axes = plt.subplots(1, len(jobs), figsize=(5 * len(jobs), 4), squeeze=False)
    for ax, ((ranks, microbatches), job) in zip(axes[0], jobs, strict=True):
        median = job.groupby(["contender", "schedule"])["seconds"].median()
        ideal = median["alone", "stage"] * (microbatches + ranks - 1) / microbatches
        schedules = list(dict.fromkeys(job["schedule"]))[1:]
        for shift, (engine, colour) in enumerate(COLOURS.items()):
            places = [i for i, name in enumerate(schedules) if (engine, name) in median]
            heights = [1e3 * median[engine, schedules[i]] for i in places]
            ax.bar([i + 0.2 * (shift - 1.5) for i in places], heights, 0.2, color=colour, label=engine)
        ax.axhline(1e3 * ideal, color="black", linewidth=0.8, linestyle="--", label="1F1B's ideal")
        ax.axhline(1e3 * median["alone", "stage"], color="gray", linewidth=0.8, linestyle=":", label="no bubble")
        ax.set_xticks(range(len(schedules)), schedules, rotation=30, ha="right")
        ax.set_title(f"{ranks} ranks, {microbatches} micro-batches")
        ax.set_ylabel("ms per step (forward and backward)")
        ax.set_ylim(top=1.35 * ax.get_ylim()[1])
        ax.legend(fontsize=7, loc="upper center", ncol=2)
    figure.tight_layout()
    figure.savefig(HERE / "results.png", dpi=110)


if __name__ == "__main__":
    main()
