"""The cost of sums whose order does not depend on the layout: a step with them against a step without.

    python -m benchmarks.exactness.cost

Jobs of one, two and four ranks take turns. Writes cost.csv.
"""

import sys
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import pandas as pd

from benchmarks.exactness.cost_ranks import LAYOUTS
from benchmarks.measure import ratio
from benchmarks.turns import Job

ROUNDS = 9
WARM_UP = 2


def main() -> None:
    with ExitStack() as stack:
        jobs = {ranks: stack.enter_context(Job(ranks, "benchmarks.exactness.cost_ranks")) for ranks in LAYOUTS}
        turns = [(job, name) for job in jobs.values() for name in job.names]
        seconds: dict[str, list[float]] = {name: [] for _, name in turns}
        for number in range(WARM_UP + ROUNDS):
            for job, name in turns[:: -1 if number % 2 else 1]:
                elapsed = job.time(name)
                if number >= WARM_UP:
                    seconds[name].append(elapsed)
            print(f"round {number + 1} of {WARM_UP + ROUNDS}", file=sys.stderr, flush=True)
    rows = []
    for tree in (name for name in seconds if name.endswith(", tree")):
        case = tree.removesuffix(", tree")
        plain = seconds[f"{case}, plain"]
        rows.append([case, 1e3 * median(plain), 1e3 * median(seconds[tree]), ratio(seconds[tree], plain)])
    table = pd.DataFrame(rows, columns=["model and layout", "plain, ms", "tree, ms", "ratio"])
    table.to_csv(Path(__file__).parent / "cost.csv", index=False, float_format="%.4g")
    print(table.to_string(index=False))


if __name__ == "__main__":
    main()
