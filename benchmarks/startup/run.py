"""Time from `mpirun` to the first training step, compared with the same number of ranks that only import torch.

    python -m benchmarks.startup.run [--ranks 4] [--rounds 5]

The two jobs alternate. The caches are warm: the data is prepared, and Python's bytecode is compiled.
"""

import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.measure import environment
from fira.models.registry import PRESETS, RECIPES

TOKENS = RECIPES["fira-tiny"].batch_size * PRESETS["fira-tiny"].seq_len  # per step
RESULTS = Path(__file__).with_name("results.csv")
COLUMNS = ("import torch", "to the first step", "to its end")


def import_torch(ranks: int, environ: dict[str, str]) -> float:
    """Return the seconds of a job that only imports torch."""
    started = time.perf_counter()
    subprocess.run(["mpirun", "-np", str(ranks), sys.executable, "-c", "import torch"], check=True, env=environ)
    return time.perf_counter() - started


def first_step(ranks: int, environ: dict[str, str]) -> tuple[float, float]:
    """Return the seconds from the start of a job until its first training step begins, and until it ends."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["mpirun", "-np", str(ranks), sys.executable, "scripts/train.py", "--steps", "2", "--out", folder]
        started = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environ) as job:
            assert job.stdout
            next(line for line in job.stdout if line.startswith("step "))
            end = time.perf_counter() - started
            job.stdout.read()
        with (Path(folder) / "training_log.csv").open() as file:
            speed = next(float(row["tokens_per_s"]) for row in csv.DictReader(file) if row["iter"] == "1")
    return end - TOKENS / speed, end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    environ = {**os.environ, "PYTHONUNBUFFERED": "1"}
    environ.pop("PYTHONDONTWRITEBYTECODE", None)
    rows = []
    for _ in range(options.rounds + 1):
        rows.append((import_torch(options.ranks, environ), *first_step(options.ranks, environ)))
        print("  ".join(f"{name} {value:.2f} s" for name, value in zip(COLUMNS, rows[-1], strict=True)), flush=True)
    rows = rows[1:]  # the first round fills the caches
    with RESULTS.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows([f"{value:.3f}" for value in row] for row in rows)
    imports, *others = zip(*rows, strict=True)
    print(environment())
    for name, column in zip(COLUMNS[1:], others, strict=True):
        ratio = statistics.median(a / b for a, b in zip(column, imports, strict=True))
        print(f"{name}: {statistics.median(column):.2f} s, {ratio:.2f} times the import of torch")


if __name__ == "__main__":
    main()
