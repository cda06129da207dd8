"""Find the rank that ended a job, and the cause, in the output of the job.

An exception, a hang, and with MPICH the death of a rank are reported by `pipeline.mpi`. Otherwise the launcher reports
the death of a rank. Open MPI and Slurm name the rank, MPICH names the process.
"""

import re
import signal
from dataclasses import dataclass

RAISED = re.compile(r"rank (\d+) failed(?: in ([^:\n]+))?:(.*)\n")
NOT_THE_EXCEPTION = (" ", "\n", "Traceback", "During", "The above")  # beginnings of other lines of a traceback
REPORTED = re.compile(r"pipeline: (rank (\d+) .*?)(?:; the job ends| and ends the job|;|$)", re.M)
KILLED = re.compile(r"killed by (?:(SIG\w+)|signal (\d+))")
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


def find_cause(status: int, output: str) -> ExitCause:
    """Return the cause in the output of a job.

    status: exit status of the launcher; negative if a signal ended the launcher.
    """
    reports = [_reported(report) for report in REPORTED.finditer(output)]
    if killed := next((cause for cause in reports if cause.signal), None):
        return killed  # also the cause of exceptions of other ranks
    if found := RAISED.search(output):
        place = f" in {found[2]}" if found[2] else ""
        exception = found[3].strip() or _exception(output[found.end() :])
        return ExitCause(f"rank {found[1]} raised {exception}{place}", int(found[1]))
    if reports:
        return reports[0]
    if found := OPEN_MPI.search(output):
        return _by_signal(int(found[2]), f"rank {found[1]}", int(found[1]))
    if found := MPICH.search(output):
        return _by_signal(int(found[3]), f"process {found[1]} on {found[2]}")
    if (found := SLURM.search(output)) and found[2] in SIGNALS:
        return _by_signal(SIGNALS[found[2]], f"rank {found[1]}", int(found[1]))
    if status < 0:
        return _by_signal(-status, "the launcher")
    if status == 0:
        return ExitCause("the ranks ended with status 0 before the last step")
    return ExitCause(f"the launcher ended with status {status}")


def _reported(report: re.Match[str]) -> ExitCause:
    name = KILLED.search(report[1])
    number = (signal.Signals[name[1]] if name[1] else int(name[2])) if name else None
    return ExitCause(report[1], int(report[2]), number)


def _exception(traceback: str) -> str:
    """The first line of a traceback that names an exception."""
    lines = traceback.splitlines(keepends=True)
    return next((line.strip() for line in lines if not line.startswith(NOT_THE_EXCEPTION)), "an exception")


def _by_signal(number: int, ended: str, rank: int | None = None) -> ExitCause:
    try:
        name = signal.Signals(number).name
    except ValueError:  # most real-time signals have no name
        name = f"signal {number}"
    return ExitCause(f"{name} ended {ended}", rank, number)
