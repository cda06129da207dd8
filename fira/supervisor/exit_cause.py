"""Find out from the output of a job which rank ended it, and how.

| ended by | message of |
|---|---|
| exception, hang, exit of one rank | `pipeline.mpi`, with the rank |
| signal | the launcher: Open MPI and Slurm name the rank, MPICH names the process |
"""

import re
import signal
from collections.abc import Mapping
from dataclasses import dataclass

EXCEPTION = re.compile(r"rank (\d+) failed:\n(?:(?:Traceback|During|The above| |\n).*\n?|\n)*(\S.*)")
REPORTED = re.compile(r"pipeline: (rank (\d+) .*?)(?:;? the job ends| and ends the job|;|$)", re.M)
MPICH = re.compile(r"PID (\d+) RUNNING AT (\S+)(?:.*\n)*?.*\(signal (\d+)\)")
OPEN_MPI = re.compile(r"process rank (\d+) with PID \d+ on node \S+ exited on\s+signal (\d+)")
SLURM = re.compile(r"error: \S+ task (\d+): ([A-Z][a-z]+(?: [a-z]+)*)")  # "srun: error: node1: task 1: Killed"
SIGNALS = {signal.strsignal(number): number for number in signal.valid_signals()}


@dataclass(frozen=True)
class ExitCause:
    """Why a job ended. rank, signal: of the rank that ended first, where they are known."""

    text: str
    rank: int | None = None
    signal: int | None = None


def find_cause(status: int, output: str, ranks: Mapping[int, int]) -> ExitCause:
    """Return the cause in the output of a job.

    status: exit status of the launcher; negative if a signal ended the launcher. ranks: rank by process id, of the
    ranks on this machine.
    """
    if found := EXCEPTION.search(output):
        return ExitCause(f"rank {found[1]} raised {found[2].strip()}", int(found[1]))
    if found := REPORTED.search(output):
        return ExitCause(found[1], int(found[2]))
    if found := OPEN_MPI.search(output):
        return _by_signal(int(found[2]), int(found[1]))
    if found := MPICH.search(output):
        return _by_signal(int(found[3]), ranks.get(int(found[1])), f"process {found[1]} on {found[2]}")
    if (found := SLURM.search(output)) and found[2] in SIGNALS:
        return _by_signal(SIGNALS[found[2]], int(found[1]))
    if status < 0:
        return ExitCause(f"{_name(-status)} ended the launcher", None, -status)
    if status == 0:
        return ExitCause("the ranks ended with status 0 before the last step")
    return ExitCause(f"the launcher ended with status {status}")


def _by_signal(number: int, rank: int | None, process: str = "a rank") -> ExitCause:
    return ExitCause(f"{_name(number)} ended {process if rank is None else f'rank {rank}'}", rank, number)


def _name(number: int) -> str:
    return signal.Signals(number).name if number in signal.valid_signals() else f"signal {number}"
