"""One job: a launcher, such as mpirun, and the ranks that it starts."""

import ctypes
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

from fira.doctor.launcher import find_launchers, find_library, implementation
from fira.errors import UserError
from fira.files import errors_naming
from fira.supervisor.hosts import Slots

JOB = "FIRA_JOB"  # environment variable that identifies the processes of a job
LINES = 2000  # of the output that are kept for the cause of a failure
STOP_S = 5.0  # for the launcher to end the ranks of all machines
POLL_S = 0.02
PR_SET_PDEATHSIG = 1  # include/uapi/linux/prctl.h
if sys.platform == "linux":
    LIBC = ctypes.CDLL(None)  # loaded here, because little is safe between fork and exec


def launcher_words(given: str | None) -> list[str]:
    """The launcher with its flags: the given one, else srun within a job of Slurm, else mpirun.

    Raises UserError if there is none.
    """
    if given is not None:
        with suppress(ValueError):  # an unclosed quote
            if words := shlex.split(given):
                return words
        raise UserError(f"--launcher {given}: give a program and its flags, such as 'mpirun --oversubscribe'")
    if "SLURM_JOB_ID" in os.environ and shutil.which("srun"):
        library, _ = find_library()
        mpi = "pmix" if library and implementation(library).startswith("Open MPI") else "pmi2"
        return ["srun", "--kill-on-bad-exit=1", f"--mpi={os.environ.get('SLURM_MPI_TYPE', mpi)}"]
    if launchers := find_launchers():
        return [launchers[0].path]
    raise UserError("--elastic needs mpirun, and there is none: pip install mpich, or give --launcher")


def launch_command(launcher: Sequence[str], ranks: int, placement: Slots | None, program: Sequence[str]) -> list[str]:
    """The command that starts a program on a number of ranks.

    placement: ranks by host; None: the launcher chooses.
    """
    if Path(launcher[0]).name == "srun":
        hosts = ["--nodes", str(len(placement)), "--nodelist", ",".join(placement)] if placement else []
        return [*launcher, "--ntasks", str(ranks), *hosts, *program]
    hosts = ["--host", ",".join(f"{host}:{n}" for host, n in placement.items())] if placement else []
    return [*launcher, *hosts, "-n", str(ranks), *program]


class Job:
    """A running job. Its output is passed on, and its last lines are kept.

    variables: of the environment, in addition to those of this process.

    The launcher runs in a session of its own, so that signals of the terminal reach the supervisor only. MPICH's mpirun
    starts each rank in yet another session. The processes of a job are identified by a variable in their environment.
    """

    def __init__(self, command: Sequence[str], variables: Mapping[str, str]) -> None:
        self.name = uuid4().hex
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        environment = {**os.environ, **variables, JOB: self.name}
        with errors_naming(Path(command[0])):
            self._process = subprocess.Popen(  # type: ignore[call-overload]
                command, **pipes, env=environment, start_new_session=True, preexec_fn=end_with_parent
            )
        self._lines: deque[bytes] = deque(maxlen=LINES)
        self._silent = False
        assert self._process.stdout
        assert self._process.stderr
        streams = [(self._process.stdout, sys.stdout.buffer), (self._process.stderr, sys.stderr.buffer)]
        self._copies = [threading.Thread(target=self._copy, args=pair, daemon=True) for pair in streams]
        for copy in self._copies:
            copy.start()

    def wait(self, seconds: float) -> int | None:
        """Wait at most some seconds for the end of the launcher. Return its exit status, or None if it still runs."""
        with suppress(subprocess.TimeoutExpired):
            return self._process.wait(seconds)
        return None

    def request_checkpoint(self) -> None:
        """Send SIGUSR1 to the launcher, which forwards it to the ranks."""
        with suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGUSR1)

    def stop(self) -> None:
        """End all ranks, and return when no process of the job is left on this machine.

        Two SIGINT signals, as from pressing Ctrl-C twice, make mpirun and srun end the ranks of all machines. Their
        output about it is discarded.
        """
        for limit in (0.2, STOP_S):
            if self._process.poll() is None:
                self._silent = True
                self._process.send_signal(signal.SIGINT)
                with suppress(subprocess.TimeoutExpired):
                    self._process.wait(limit)
        self._process.kill()  # no effect after its end
        deadline = time.monotonic() + STOP_S
        while (left := processes(self.name)) and time.monotonic() < deadline:
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._process.poll()
            time.sleep(POLL_S)
        for copy in self._copies:
            copy.join(STOP_S)

    def output(self) -> str:
        """The last lines of stdout and stderr."""
        return b"".join(self._lines.copy()).decode(errors="replace")

    def _copy(self, source: BinaryIO, target: BinaryIO) -> None:
        """Pass lines on. A closed target, as in `… | head`, does not stop the job: its output is then discarded."""
        with source:
            for line in source:
                self._lines.append(line)
                with suppress(OSError, ValueError):
                    if not self._silent:
                        target.write(line)
                        target.flush()


def end_with_parent(number: int = signal.SIGTERM) -> None:
    """Let the kernel send a signal to this process when its parent ends. Without Linux this does nothing.

    After SIGTERM to a launcher, its ranks save a checkpoint and end.
    """
    if sys.platform == "linux":
        LIBC.prctl(PR_SET_PDEATHSIG, number)


def processes(job: str) -> list[int]:
    """The processes of a job on this machine that have not ended."""
    mark, found = f"{JOB}={job}".encode(), []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # of another user, or ended in the meantime
            if mark in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found
