"""Inject faults into training runs and write the table of docs/reliability-faults.md: `python -m tests.chaos`.

Each run has one fault (`cases.py`, `faulty_train.py`). It must end within LIMIT_S seconds, or within the timeout and
LIMIT_S where it hangs, with the expected status and output, and leave no process. The status of this program is 1 if
one of them does not.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.chaos.cases import CASES, HARMLESS, Case
from tests.launch import ROOT, inherited, mpirun

TIMEOUT_S = 5.0  # --timeout of the runs
LIMIT_S = 10.0
START_S = 120.0  # for a run to start and to reach its fault
SETTINGS = f"""
model_set = "d_model=16,num_layers=4,d_ff=16,n_head=2,dropout=0.1"
vocab_size = 300
seq-len = 16
batch_size = 12
micro_batch_size = 2
plan = "none"
eval_every = 2
eval_sequences = 8
save_every = 2
pp = 2
timeout = {TIMEOUT_S}
"""
HEADER = """# Fault table

One fault is injected into one rank of a small training run (two pipeline stages, with 4 ranks two replicas;
`--timeout {timeout:g}`). Every run must end with a message that names the rank and what it was doing, with exit
status 2 if a user can correct the cause and another status above 0 otherwise, and without leaving a process. A fault
that the timeout reports, such as `stopped`, `endless_loop` or `idle`, must end within {limit:g} s after the timeout,
every other fault within {limit:g} s. `slow` and `folder_removed` are reported in the log
and the run continues. Two cases are not faults:
`long`, an activity that may take longer than the timeout, and `sys_exit` at the exit. `python -m tests.chaos` writes
this page.

| fault | place | ranks | s until the end | status | first line of the message | processes left |
|---|---|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Outcome:
    """A finished run. seconds: from the fault to the end of the job. left: processes. problems: what is wrong."""

    case: Case
    seconds: float
    status: int
    output: str
    error: str
    left: int
    problems: list[str]

    def row(self) -> str:
        """Row of the table."""
        first = next((line for line in self.error.splitlines() if line.strip()), "")
        first = re.sub(r"\(process \d+\)", "(process …)", first).replace("|", "\\|")
        first = re.sub(r"/tmp/\S*?/(run|shards)", r"\1", first)
        seconds = "continues" if self.case.status == 0 else f"{self.seconds:.1f}"
        cells = self.case.fault, self.case.place, self.case.ranks, seconds, self.status, first, self.left
        return f"| {' | '.join(map(str, cells))} |"


def run(case: Case) -> Outcome:
    """Run the training with the fault in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="chaos_") as name:
        folder, marker = Path(name), f"CHAOS_JOB={uuid.uuid4().hex}"
        command = _command(case, folder)
        variable, value = marker.split("=")
        environment = inherited() | {variable: value, "FIRA_CACHE": f"{folder}/cache"}
        environment |= {"PIPELINE_MPI_HANG_DIR": f"{folder}/hang-reports"}
        with (folder / "output").open("w") as out, (folder / "error").open("w") as err:
            process = subprocess.Popen(
                command, stdout=out, stderr=err, env=environment, cwd=ROOT, start_new_session=True
            )
            try:
                status = process.wait(START_S)
            except subprocess.TimeoutExpired:
                status = -1
            ended = time.time()
            left = _remaining(marker)
            for pid in left:
                os.kill(pid, 9)
            process.kill()
            process.wait()
        fault = folder / "fault"
        seconds = ended - float(fault.read_text()) if fault.exists() else float("nan")
        output, error = ((folder / name).read_text() for name in ("output", "error"))
        problems = _problems(case, seconds, status, error, len(left))
        return Outcome(case, seconds, status, output, error, len(left), problems)


def _problems(case: Case, seconds: float, status: int, error: str, left: int) -> list[str]:
    problems = [f"the message does not contain {pattern}" for pattern in case.missing(error)]
    limit = LIMIT_S + (TIMEOUT_S if "has waited" in error else 0)
    if case.status != 0 and (case.fault, case.place) not in HARMLESS and not seconds < limit:
        problems.append(f"{seconds:.1f} s until the end")
    if status < 0 or (status in (0, 2) if case.status is None else status != case.status):
        problems.append(f"status {status}")
    if left:
        problems.append(f"{left} processes left")
    return problems


def _command(case: Case, folder: Path) -> list[str]:
    """The command of a run; `folder` gets its data and settings."""
    settings = folder / "settings.toml"
    data = folder / "text.txt"
    if case.shards:
        data = folder / "shards"
        data.mkdir()
        tokens = np.random.default_rng(0).integers(0, 300, 50_000).astype(np.uint16)
        np.save(data / "x_train_0.npy", tokens)
        np.save(data / "x_val_0.npy", tokens[:5000])
    else:
        shutil.copy(argparse.__file__, data)
    steps = 70 if case.fault == "slow" else 4
    settings.write_text(f'{SETTINGS}\ndata = "{data}"\nout = "{folder}/run"\nsteps = {steps}\n')
    script = [sys.executable, ROOT / "tests" / "chaos" / "faulty_train.py", case.fault, case.place, folder]
    command = [mpirun(), "-np", case.ranks, *script, "--config", settings]
    if case.small_disk:
        (folder / "run").mkdir()
        mount = f'mount -t tmpfs -o size=4m none "{folder}/run" && exec "$@"'
        command = ["unshare", "--mount", "sh", "-c", mount, "-", *command]
    return [str(part) for part in command]


def _remaining(marker: str) -> list[int]:
    """The processes with this environment variable that have not ended after 2 s."""
    deadline = time.monotonic() + 2
    while (found := _marked(marker)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


def _marked(marker: str) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if marker.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="faults to run, such as killed-training-2; default: all")
    parser.add_argument("--out", type=Path, help="write the table to this file")
    options = parser.parse_args(arguments)
    outcomes = []
    for case in CASES:
        if not options.names or any(re.fullmatch(name, case.name) for name in options.names):
            outcome = run(case)
            outcomes.append(outcome)
            print(outcome.row(), flush=True)
            for problem in outcome.problems:
                print(f"  FAILED {case.name}: {problem}\n{outcome.output}{outcome.error}", flush=True)
    failed = [outcome for outcome in outcomes if outcome.problems]
    if options.out:
        rows = "".join(f"{outcome.row()}\n" for outcome in outcomes)
        options.out.write_text(HEADER.format(timeout=TIMEOUT_S, limit=LIMIT_S) + rows)
    print(f"{len(outcomes)} faults, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
