"""Run a program with a time limit. No process that it starts survives the call."""

import json
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.mpi.launchers import without_launcher

EXIT_S = 5.0  # time for the other processes of a program to end after its first one


@dataclass(frozen=True)
class Outcome:
    """How a program ended. status: None if it was stopped at its limit. left: processes that did not end with it."""

    status: int | None
    output: str  # stdout and stderr
    seconds: float
    left: int

    def last_lines(self, count: int) -> str:
        """The last lines of the output that are not empty."""
        return "\n".join([line for line in self.output.splitlines() if line.strip()][-count:])

    def objects(self, first_key: str) -> list[dict[str, Any]]:
        """The JSON objects in the output that begin with a key. mpirun may put those of several ranks into one line."""
        starts = [found.start() for found in re.finditer(rf'{{"{first_key}"', self.output)]
        return [json.JSONDecoder().raw_decode(self.output, start)[0] for start in starts]


def run_limited(command: Sequence[str], limit_s: float, env: Mapping[str, str] | None = None) -> Outcome:
    """Run a command in a session of its own, and kill the session when the command has ended or at the limit.

    env: default: this process's environment without the variables of an MPI launcher.
    """
    environment = without_launcher(os.environ) if env is None else env
    started = time.monotonic()
    with tempfile.TemporaryFile() as output:
        # A file instead of a pipe: a process that outlives the command cannot block the reader.
        streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, **streams, env=environment, start_new_session=True)  # type: ignore[call-overload]
        status, left = None, 0
        try:
            with suppress(subprocess.TimeoutExpired):
                status = process.wait(limit_s)
            seconds = time.monotonic() - started
            if status is not None:
                left = _remaining(process.pid)
        finally:
            _kill(process)
        output.seek(0)
        return Outcome(status, output.read().decode(errors="replace"), seconds, left)


def _remaining(session: int) -> int:
    """The number of processes of a session that have not ended after `EXIT_S`."""
    deadline = time.monotonic() + EXIT_S
    while (running := _members(session)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return len(running)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a program and all processes of its session."""
    if process.returncode is None:  # the number of an ended process may be in use again
        process.kill()
    for pid in _members(process.pid):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    _remaining(process.pid)


def _members(session: int) -> list[int]:
    """The running processes of a session. mpirun puts its children in separate process groups."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, its_session = stat.read_text().rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):
            continue  # the process has ended in the meantime
        if int(its_session) == session and state not in "XZ":
            found.append(int(stat.parent.name))
    return found
