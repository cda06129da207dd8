"""The planner's memory compared with measurements: python -m benchmarks.memory.accuracy. Writes accuracy.csv."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd

from benchmarks.measure import environment

HERE = Path(__file__).parent


def main() -> None:
    print(environment())
    rows = []
    for ranks in (1, 2, 4):
        command = ["mpirun", "-np", str(ranks), sys.executable, "-m", "benchmarks.memory.accuracy_ranks"]
        # With one thread Muon has one matrix at a time, as on a machine with a core per rank.
        one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=one_thread)
        lines = [line.removeprefix("row:") for line in result.stdout.splitlines() if line.startswith("row:")]
        rows += [json.loads(line) | {"ranks": ranks} for line in lines]
    table = pd.DataFrame(rows)[["ranks", "layout", "case", "predicted_mb", "measured_mb"]]
    table.to_csv(HERE / "accuracy.csv", index=False, float_format="%.5g")
    print("| layout | case | predicted | measured | error |")
    print("|" + "---|" * 5)
    for row in table.itertuples():
        error = row.predicted_mb / row.measured_mb - 1
        print(f"| {row.layout} | {row.case} | {row.predicted_mb:.1f} | {row.measured_mb:.1f} | {error:+.1%} |")


if __name__ == "__main__":
    main()
