"""Compare predicted with measured step time: python -m benchmarks.planner.run"""

import csv
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
COLUMNS = ("predicted_ms", "measured_ms")


def main() -> None:
    rows = []
    for ranks in (1, 2, 4):
        command = ["mpirun", "-np", str(ranks), sys.executable, "-m", "benchmarks.planner.ranks"]
        with tempfile.TemporaryDirectory() as cache:  # do not reuse costs that were measured under another load
            environment = os.environ | {"FIRA_CACHE": cache}
            result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
        rows += [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    with (HERE / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["model", "layout", "schedule", *COLUMNS])
        writer.writeheader()
        for row in rows:
            writer.writerow({name: f"{row[name]:.1f}" if name in COLUMNS else row[name] for name in writer.fieldnames})
    print("| model | layout | schedule | step predicted | measured | error |")
    print("|" + "---|" * 6)
    for row in rows:
        a, b = (row[name] for name in COLUMNS)
        print(f"| {row['model']} | {row['layout']} | {row['schedule']} | {a:.0f} ms | {b:.0f} ms | {a / b - 1:+.0%} |")


if __name__ == "__main__":
    main()
