"""What a GPU check gets, how it fails, and the program that runs one check: `python -m fira.doctor.gpu_check`."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path

from pipeline.mpi.launchers import launched_rank

RESULT = "result of the check:"  # the line before the result, which separates it from warnings


@dataclass(frozen=True)
class Target:
    """What is tested. device: "cuda"; "cpu" tests the checks themselves. folder: for files, shared by all checks.

    train: the words that start training, without `mpirun`. steps: of each training.
    """

    device: str
    folder: str
    train: Sequence[str]
    steps: int = 20

    @property
    def path(self) -> Path:
        return Path(self.folder)


@dataclass(frozen=True)
class GpuCheck:
    """One test. run: raises if the test fails; returns the result, of which the first line is shown in the table.

    limit_s: time limit in seconds. gpus: number of devices that it needs. arguments: of `run`, after the target.
    environment: variables of the process that runs it. ranks: that call `run`; the result is that of rank 0.
    """

    name: str
    run: Callable[..., str]
    limit_s: float
    gpus: int = 1
    arguments: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    ranks: int = 1

    def command(self, target: Target) -> list[str]:
        """The words that run this test in a separate process."""
        program = (
            *mpirun(self.ranks),
            sys.executable,
            "-m",
            "fira.doctor.gpu_check",
            self.run.__module__,
            self.run.__name__,
        )
        return [*program, json.dumps(asdict(target)), *self.arguments]


def run_program(command: Sequence[str], status: int = 0) -> str:
    """Run a program of a check and return its output. Raises AssertionError if it ends with another status."""
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run(command, **streams, text=True, errors="replace", check=False)  # type: ignore[call-overload]
    if done.returncode != status:
        print(done.stdout)
        raise AssertionError(f"ended with status {done.returncode} instead of {status}: {' '.join(command)}")
    return str(done.stdout)


def mpirun(ranks: int) -> list[str]:
    """The words that start ranks; none for one rank. The mpirun of this Python environment is preferred."""
    folders = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return [shutil.which("mpirun", path=folders) or "mpirun", "-np", str(ranks)] if ranks > 1 else []


def main(module: str, function: str, target: str, *arguments: str) -> None:
    result = getattr(import_module(module), function)(Target(**json.loads(target)), *arguments)
    sys.stderr.flush()
    if not launched_rank():  # None without mpirun
        print(f"{RESULT}\n{result}")


if __name__ == "__main__":
    main(*sys.argv[1:])
