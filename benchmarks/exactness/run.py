"""Train every family on many layouts, and compare every step and all final weights bit by bit with one rank."""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200, help="steps of each run (default: %(default)s)")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "fp64"))
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3, 4, 6, 8], help="numbers of ranks")
    options = parser.parse_args()
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for ranks in sorted({1, *options.ranks}):
            command = ["mpirun", "-np", str(ranks), sys.executable, "-m", "benchmarks.exactness.train_layouts"]
            job = subprocess.Popen(
                [*command, folder, str(options.steps), options.precision], stdout=subprocess.PIPE, text=True
            )
            assert job.stdout
            for line in filter(lambda line: line.startswith("{"), job.stdout):
                run = json.loads(line) | {"ranks": ranks}
                reference = next((other for other in runs if other["family"] == run["family"]), run)
                run["identical"] = all(run[key] == reference[key] for key in ("reported", "tensors"))
                runs.append(run)
                print("identical" if run["identical"] else "DIFFERENT", line.strip(), flush=True)
            if job.wait():
                raise SystemExit(f"the job on {ranks} ranks ended with status {job.returncode}")
    columns = ["family", "ranks", "pp", "dp", "ep", "schedule", "recompute", "identical", "tensors", "reported"]
    with open(FOLDER / f"layouts_{options.precision}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(runs)
    print(f"{sum(run['identical'] for run in runs)} of {len(runs)} runs are bitwise identical to one rank")


if __name__ == "__main__":
    main()
