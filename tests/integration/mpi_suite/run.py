"""Run PyTorch's test suite for backends on the MPI backend and, for comparison, on gloo.

    python -m tests.integration.mpi_suite.run                     # all tests, three runs, a few minutes
    python -m tests.integration.mpi_suite.run test_all_gather ... # selected tests

A test passes if it passes on every rank. The suite selects tests by the name of the backend: most run for "gloo", the
all-to-all tests for "mpi" only. The MPI backend therefore runs under both names.
"""

import json
import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from tests.launch import ROOT, run_ranks

RANKS = 4
RUNS = {"gloo": ("gloo", "gloo"), "mpi as gloo": ("cpu:mpi", "gloo"), "mpi": ("cpu:mpi", "mpi")}
Outcome = tuple[str, str]  # (pass, skip or fail; reason)


def suite_names() -> list[str]:
    """Return the names of all tests in the suite of this version of PyTorch."""
    os.environ |= {"BACKEND": "gloo", "WORLD_SIZE": str(RANKS), "TEMP_DIR": tempfile.gettempdir()}
    from torch.testing._internal.distributed.distributed_test import DistributedTest

    return [name for name in dir(DistributedTest._DistTestBase) if name.startswith("test_")]


def outcomes(backend: str, mask: str, names: Iterable[str], timeout: float = 600) -> dict[str, Outcome]:
    """Run the tests with ``backend`` under the name ``mask``. After a crash, a new job runs the remaining tests."""
    done: dict[str, Outcome] = {}
    left = list(names)
    while left:
        with tempfile.TemporaryDirectory() as out:
            script = ROOT / "tests/ranks/backend_suite.py"
            result = run_ranks(RANKS, script, backend, mask, out, *left, timeout=timeout)
            done |= _merged(Path(out))
        left = [name for name in left if name not in done]
        if left:  # the first of them crashed the job or exceeded its limit
            done[left[0]] = ("fail", result.stderr[-2000:])
            del left[0]
    return done


def _merged(out: Path) -> dict[str, Outcome]:
    """Merge the outcomes of the ranks: the worst one of each test that every rank has finished or any has failed."""
    records: dict[str, list[Outcome]] = {}
    for file in out.glob("*.jsonl"):
        for line in file.read_text().splitlines():
            record = json.loads(line)
            records.setdefault(record["name"], []).append((record["outcome"], record["reason"]))
    order = ["fail", "pass", "skip"]
    return {
        name: min(ranks, key=lambda outcome: order.index(outcome[0]))
        for name, ranks in records.items()
        if len(ranks) == RANKS or any(outcome == "fail" for outcome, _ in ranks)
    }


def main() -> None:
    names = sys.argv[1:] or suite_names()
    results = {run: outcomes(*spec, names) for run, spec in RUNS.items()}
    for run, done in results.items():
        counts = {kind: sum(outcome == kind for outcome, _ in done.values()) for kind in ("pass", "skip", "fail")}
        print(f"{run:14}", counts)
    mpi = {name for run in ("mpi as gloo", "mpi") for name, (o, _) in results[run].items() if o == "pass"}
    gloo = {name for name, (outcome, _) in results["gloo"].items() if outcome == "pass"}
    print(f"mpi passes {len(mpi)}, gloo {len(gloo)}; only gloo: {len(gloo - mpi)}, only mpi: {len(mpi - gloo)}")
    for name in sorted(gloo - mpi):
        print(f"\n{name}: {results['mpi as gloo'][name][1]}")


if __name__ == "__main__":
    main()
