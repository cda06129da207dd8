"""What checkpoints cost a training step: calls of ten steps that never save, and that save every step or every tenth.

    python -m benchmarks.checkpoints.run [--ranks 1 2 4] [--models fira-tiny 30M] [--rounds 5]

The calls take turns, so that a temporary slowdown of the machine affects all of them. Replaces the rows of
these ranks and models in results.csv.
"""

import argparse
import sys
from pathlib import Path
from statistics import median

from benchmarks.checkpoints.ranks import MODELS, STEPS
from benchmarks.measure import environment, merge, ratio
from benchmarks.turns import Job

RESULTS = Path(__file__).with_name("results.csv")


def measure(ranks: int, model: str, rounds: int) -> list[dict[str, object]]:
    """Return a row per contender. cost: share of the step time that saves add, median of the rounds."""
    with Job(ranks, "benchmarks.checkpoints.ranks", model) as job:
        seconds: dict[str, list[float]] = {name: [] for name in job.names}
        for number in range(rounds):
            for name in job.names[:: -1 if number % 2 else 1]:
                seconds[name].append(job.time(name))
            print(f"{ranks} ranks, {model}: round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    never = seconds[f"{model}, never"]
    return [
        {
            "ranks": ranks,
            "contender": name,
            "ms_per_step": 1000 * median(times) / STEPS,
            "cost": ratio(times, never) - 1,
        }
        for name, times in seconds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(environment())
    for model in options.models:
        for ranks in options.ranks:
            rows = merge(RESULTS, measure(ranks, model, options.rounds), ["ranks", "contender"])
    print("| ranks | saves | ms per step | cost |\n|---|---|---|---|")
    for row in rows.itertuples():
        print(f"| {row.ranks} | {row.contender} | {row.ms_per_step:.1f} | {100 * row.cost:.1f} % |")


if __name__ == "__main__":
    main()
