"""Replacement for mpirun that executes the next line of `jobs.txt`.

It appends its arguments and the number of threads per rank to `started.jsonl`.
The arguments after the folder of these two files are those of a launcher. A line consists of actions: `save STEP`
writes what a checkpoint and a row of the log change in the run folder, `print TEXT`, `finish`, `exit STATUS`, and
`train STEP`, which runs until SIGINT and saves STEP at SIGUSR1.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path


def main(folder: Path, arguments: list[str]) -> None:
    started = folder / "started.jsonl"
    number = len(started.read_text().splitlines()) if started.exists() else 0
    with started.open("a") as file:
        print(json.dumps([*arguments, os.environ["OMP_NUM_THREADS"]]), file=file)
    out = Path(arguments[arguments.index("--out") + 1])
    for action in (folder / "jobs.txt").read_text().splitlines()[number].split("; "):
        word, _, value = action.partition(" ")
        if word == "save":
            save(out, value)
        elif word == "print":
            print(value, flush=True)
        elif word == "finish":
            (out / "finished.json").write_text("{}")
        elif word == "train":
            signal.signal(signal.SIGUSR1, lambda *_, step=value: save(out, step))
            (out / "training_log.csv").write_text(f"iter\n{value},\n")
            time.sleep(60)
        else:
            sys.exit(int(value))


def save(out: Path, step: str) -> None:
    (out / "training_log.csv").write_text(f"iter\n{step},\n")
    (out / "checkpoints").mkdir(exist_ok=True)
    (out / "checkpoints" / "latest").write_text(f"step-{step:0>6}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
