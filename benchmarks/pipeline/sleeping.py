"""Compare the schedules' measured step times with the simulated ones, with layers that sleep instead of computing.

    python -m benchmarks.pipeline.sleeping

Writes sleeping.csv to the folder of this file, and prints the table of README.md.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.turns import Job
from pipeline.schedule import SCHEDULES, ActionKind
from pipeline.simulate import simulate

HERE = Path(__file__).parent
ROUNDS = 5
JOBS = [(2, 4), (4, 8)]  # ranks, micro-batches
COSTS = [(0.1, 0.1, 0.1), (0.125, 0.125, 0.1)]  # seconds of F, I and W; the second one with a fifth of exchange


def main() -> None:
    rows = [row for job in JOBS for costs in COSTS for row in measure(*job, costs)]
    frame = pd.DataFrame(rows)
    frame.to_csv(HERE / "sleeping.csv", index=False)
    report(frame)


def measure(ranks: int, microbatches: int, costs: tuple[float, ...]) -> Iterator[dict[str, Any]]:
    """Time all schedules in turn; yield one row per round and schedule."""
    print(f"{ranks} ranks, {microbatches} micro-batches, {costs} …", file=sys.stderr, flush=True)
    with Job(ranks, "benchmarks.pipeline.sleeping_ranks", microbatches, *costs) as job:
        for number in range(ROUNDS):
            for name in job.names[:: -1 if number % 2 else 1]:  # every other round in reverse order
                row = {"ranks": ranks, "microbatches": microbatches, "costs": " ".join(map(str, costs))}
                row |= {"schedule": name, "simulated": simulated(name, ranks, microbatches, *costs)}
                yield row | {"round": number, "seconds": job.time(name)}


def simulated(name: str, ranks: int, microbatches: int, f: float, i: float, w: float) -> float:
    spec = SCHEDULES[name]
    schedule = spec.builder(ranks, microbatches)
    per_rank = dict(zip(ActionKind, (f, i + w, i, w), strict=True))
    per_stage = {kind: [cost / spec.stages_per_rank] * schedule.stages for kind, cost in per_rank.items()}
    return simulate(schedule, per_stage).length


def report(frame: pd.DataFrame) -> None:
    """Print times, and speeds relative to 1F1B as medians of the rounds' ratios; simulated ones in parentheses."""
    jobs = {key: job.set_index(["schedule", "round"]) for key, job in frame.groupby(["ranks", "microbatches", "costs"])}
    headings = [f"{ranks} ranks, {count} micro-batches, F I W {costs} s" for ranks, count, costs in jobs]
    print(f"| schedule | {' | '.join(headings)} |")
    print("|---" * (1 + len(jobs)) + "|")
    for name in SCHEDULES:
        cells = []
        for job in jobs.values():
            own, base = job.loc[name], job.loc["1f1b"]
            speed, expected = ((base[column] / own[column]).median() for column in ("seconds", "simulated"))
            milliseconds = (1e3 * own[["seconds", "simulated"]]).median()
            cells.append(
                f"{milliseconds['seconds']:.0f} ({milliseconds['simulated']:.0f}) ms: {speed:.2f} ({expected:.2f})"
            )
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
