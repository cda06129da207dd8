"""The processes of the ranks on this machine: whether they run, are stopped or dead, and what they were doing."""

import os
from contextlib import suppress
from pathlib import Path

from mpi4py import MPI

from pipeline.mpi.activity import open_activity, share
from pipeline.mpi.guardian import LONG, claim, describe_death, read_activity


class Processes:
    """The processes of the ranks on this machine, those with the same boot id and PID namespace.

    Args:
        comm: a communicator of all ranks.
    """

    def __init__(self, comm: MPI.Intracomm) -> None:
        self._rank = comm.Get_rank()
        try:
            machine = Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink("/proc/self/ns/pid")
        except OSError:  # not Linux, or a sandbox: no other rank is known to be local
            machine = f"rank {self._rank}"
        processes = comm.allgather((machine, os.getpid(), share()))
        local = {rank: process[1:] for rank, process in enumerate(processes) if process[0] == machine}
        self._pids = {rank: pid for rank, (pid, _) in local.items()}
        self._activities = {rank: open_activity(*process) for rank, process in local.items()}

    def handles(self) -> dict[int, int]:
        """Return file descriptors that become readable when the process of another rank ends, with its rank."""
        handles = {}
        for rank, pid in self._pids.items():
            # An old kernel, an old Python, a sandbox, or a process that is dead already: the timeout reports the death.
            with suppress(AttributeError, OSError):
                if rank != self._rank:
                    handles[os.pidfd_open(pid)] = rank
        return handles

    def can_answer(self, rank: int) -> bool:
        """Return whether a rank is neither stopped nor dead, as far as this rank can determine it."""
        return self._state(rank) not in "TXZ"

    def is_dead(self, rank: int) -> bool:
        """Return whether the process of a rank on this machine has ended."""
        return self._state(rank) in "XZ"

    def is_local(self, rank: int) -> bool:
        """Return whether a rank is on this machine."""
        return rank in self._pids

    def cpu_s_of_long_activity(self, rank: int) -> float | None:
        """Return the CPU seconds that a rank has used if its activity may take longer than the timeout, else None."""
        memory = self._activities.get(rank)
        if memory is None or not memory[LONG] or not self.can_answer(rank):
            return None
        user, system = self._stat(rank)[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def why_silent(self, rank: int) -> str:
        """Return the reason why a rank does not answer, and its activity, as far as this rank can determine them."""
        state = self._state(rank)
        if state == "?":
            return "no answer from its machine"
        process = f"its process {self._pids[rank]}"
        activity = read_activity(self._activities[rank])
        during = f"; it was in {activity}" if activity else ""
        if state == "T":
            return f"{process} is stopped (SIGSTOP){during}"
        if state in "XZ":
            return f"{process} is dead{during}"
        return f"{process} runs, but too slowly or in C code that holds Python's global interpreter lock{during}"

    def death(self, rank: int) -> tuple[str, int]:
        """Return how a rank died, and an exit status for the job."""
        return describe_death(rank, self._pids[rank], self._activities[rank])

    def claim(self, rank: int) -> bool:
        """Return whether the death of a rank has not been reported yet. If so, the caller must report it."""
        return claim(self._activities[rank])

    def _state(self, rank: int) -> str:
        """Return the state of a rank's process as ``ps`` does, or ``?`` if it is on another machine."""
        return self._stat(rank)[0] if rank in self._pids else "?"

    def _stat(self, rank: int) -> list[str]:
        """Return the fields of ``/proc/<pid>/stat`` from the state on; state Z if the process is gone."""
        try:
            return Path(f"/proc/{self._pids[rank]}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return ["Z", *["0"] * 49]
