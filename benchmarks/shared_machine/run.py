"""Speed alone and next to a busy program, with our wait policy and with fixed ones of GNU OpenMP.

    python -m benchmarks.shared_machine.run [--ranks 1] [--rounds 5]

One job per policy. They take turns, alone and next to a process that always computes, for at least BURST_S each. Writes
a row per round to results-RANKS.csv and prints medians.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

import pandas as pd

from benchmarks.shared_machine.work import UNITS
from benchmarks.turns import Job

VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
POLICIES = {
    "300,000 spins (default of the library)": {"GOMP_SPINCOUNT": "300000"},
    "10,000 spins": {"GOMP_SPINCOUNT": "10000"},
    "1,000 spins": {"GOMP_SPINCOUNT": "1000"},
    "no spinning (OMP_WAIT_POLICY=passive)": {"OMP_WAIT_POLICY": "passive"},
    "fira": {},
}
BURST_S = 4.0


class BusyProgram:
    """A process that computes while it is `running`."""

    def __init__(self) -> None:
        self.process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        self.process.send_signal(signal.SIGSTOP)

    @contextmanager
    def running(self) -> Iterator[None]:
        self.process.send_signal(signal.SIGCONT)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGSTOP)

    def __enter__(self) -> "BusyProgram":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


def start(ranks: int, variables: dict[str, str]) -> Job:
    for name in VARIABLES:
        os.environ.pop(name, None)
    os.environ.update(variables)
    return Job(ranks, "benchmarks.shared_machine.work")


def speed(job: Job, work: str) -> float:
    """Tokens per second of calls that together take at least BURST_S."""
    seconds: list[float] = []
    while sum(seconds) < BURST_S:
        seconds.append(job.time(work))
    return UNITS[work] * len(seconds) / sum(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    rows = []
    with ExitStack() as stack:
        jobs = {name: stack.enter_context(start(options.ranks, values)) for name, values in POLICIES.items()}
        busy = stack.enter_context(BusyProgram())
        for number in range(options.rounds):
            for company in (False, True):
                for policy, job in list(jobs.items())[:: -1 if number % 2 else 1]:
                    for work in job.names:
                        with busy.running() if company else nullcontext():
                            tokens = speed(job, work)
                        rows.append((work, policy, "company" if company else "alone", number, tokens))
                        time.sleep(1)  # other programs on the machine get a turn
            print(f"round {number + 1} of {options.rounds}", file=sys.stderr, flush=True)
    frame = pd.DataFrame(rows, columns=["work", "policy", "machine", "round", "tokens_per_s"])
    frame.to_csv(Path(__file__).with_name(f"results-{options.ranks}.csv"), index=False, float_format="%.1f")
    base = next(iter(POLICIES))
    print(
        "| work | policy | alone | next to a busy program | share of the default's speed alone |\n|---|---|---|---|---|"
    )
    for work in frame["work"].unique():
        median = frame[frame["work"] == work].groupby(["policy", "machine"])["tokens_per_s"].median()
        for policy in POLICIES:
            alone, company = median[policy, "alone"], median[policy, "company"]
            shares = [value / median[base, "alone"] for value in (alone, company)]
            print(f"| {work} | {policy} | {alone:,.0f} | {company:,.0f} | {shares[0]:.2f}, {shares[1]:.2f} |")


if __name__ == "__main__":
    main()
