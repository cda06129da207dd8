"""Run PyTorch's own suite for backends on ours, and on gloo beside it.

    python -m tests.pipeline.mpi.suite.run                     # every test, three runs, a few minutes
    python -m tests.pipeline.mpi.suite.run test_all_gather ... # some

A test passes if it passes on every rank. The tests choose by name what a backend is asked: most run under the name
"gloo", the all-to-all tests under "mpi" only; ours runs under both.
"""

import json
import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from tests.launch import run_ranks

RANKS = 4
RUNS = {"gloo": ("gloo", "gloo"), "ours as gloo": ("cpu:mpi", "gloo"), "ours as mpi": ("cpu:mpi", "mpi")}
Outcome = tuple[str, str]  # pass, skip or fail; the reason


def suite_names() -> list[str]:
    """Every test of the suite that ships with this PyTorch."""
    os.environ |= {"BACKEND": "gloo", "WORLD_SIZE": str(RANKS), "TEMP_DIR": tempfile.gettempdir()}
    from torch.testing._internal.distributed.distributed_test import DistributedTest

    return [name for name in dir(DistributedTest._DistTestBase) if name.startswith("test_")]


def outcomes(backend: str, mask: str, names: Iterable[str], timeout: float = 600) -> dict[str, Outcome]:
    """Outcome of every test with ``backend`` under the name ``mask``. A job that dies goes on behind its last test."""
    done: dict[str, Outcome] = {}
    left = list(names)
    while left:
        with tempfile.TemporaryDirectory() as out:
            script = Path(__file__).with_name("ranks.py")
            result = run_ranks(RANKS, script, backend, mask, out, *left, timeout=timeout)
            done |= _merged(Path(out))
        left = [name for name in left if name not in done]
        if left:  # the first of them took the job down, or hung
            done[left[0]] = ("fail", result.stderr[-2000:])
            del left[0]
    return done


def _merged(out: Path) -> dict[str, Outcome]:
    """The ranks' outcomes as one: the worst, if every rank finished the test."""
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
    ours = {name for run in ("ours as gloo", "ours as mpi") for name, (o, _) in results[run].items() if o == "pass"}
    gloo = {name for name, (outcome, _) in results["gloo"].items() if outcome == "pass"}
    print(f"ours passes {len(ours)}, gloo {len(gloo)}; gloo alone: {len(gloo - ours)}, ours alone: {len(ours - gloo)}")
    for name in sorted(gloo - ours):
        print(f"\n{name}: {results['ours as gloo'][name][1]}")


if __name__ == "__main__":
    main()
