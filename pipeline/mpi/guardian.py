"""Guardian: a small process next to each rank, so that no rank can die without a message or with status 0.

MPICH's ``mpirun`` notices the death of a rank when the rank's connection to it closes. It then kills the other ranks
before these can report, and returns 0 if the rank called ``os._exit(0)``. The guardian holds the connection open as
well. When its rank dies, the other ranks therefore have ``REPORT_S`` seconds to report it (``watch.py``) and to end the
job. If they have not, because they have not reached ``init()`` yet, the guardian does both. After a signal, ``mpirun``
may still kill the other ranks at any moment; then the guardian prints the line that names the rank.

Open MPI and Slurm name the rank themselves. There, and on systems without ``pidfd_open``, no guardian is started.

This file is also the guardian's program, which imports only a few modules and needs 20 ms and 10 MB.
"""

import fcntl
import mmap
import os
import select
import socket
import stat
import struct
import sys
import termios
import time

REPORT_S = 7.0  # longer than the other ranks need for a report
POLL_S = 0.05  # after the rank's death
READ_S = 1.0  # for the launcher to read what was printed
PIDFD_GET_INFO, INFO_EXIT = 0xC040FF0B, 8  # include/uapi/linux/pidfd.h
IN_ORDER = -1  # instead of a wait status

# Shared memory of a rank: its activity, whether its death has been reported, and how it ended (0 or 1, wait status)
TEXT_BYTES = 256
CLAIM, STATUS, MEMORY_BYTES = TEXT_BYTES, TEXT_BYTES + 1, TEXT_BYTES + 4

_lifeline: int | None = None  # written to when the rank ends in order


def start(activity: int) -> None:
    """Start this rank's guardian, if ``mpirun`` is that of MPICH and it does not run yet.

    Args:
        activity: descriptor of the memory that contains this rank's activity; -1 if there is none.
    """
    global _lifeline
    if _lifeline is not None or not {"PMI_FD", "PMI_RANK", "HYDI_CONTROL_FD"} <= os.environ.keys():
        return
    if activity < 0 or not hasattr(os, "pidfd_open"):
        return
    import atexit
    import subprocess

    read, _lifeline = os.pipe()
    connection, rank = int(os.environ["PMI_FD"]), os.environ["PMI_RANK"]
    subprocess.Popen(
        [sys.executable, "-ISE", __file__, *map(str, (os.getpid(), connection, activity, rank, os.getppid()))],
        stdin=read,
        stdout=subprocess.DEVNULL,
        pass_fds=[connection, activity],
        start_new_session=True,  # signals to the job are not for the guardian
    )
    os.close(read)
    atexit.register(release)  # the first function registered, thus the last one called


def release() -> None:
    """End the guardian, because this rank ends in order or ends the job itself."""
    if _lifeline is not None:
        os.write(_lifeline, b"!")


def describe_death(rank: int, pid: int, memory: mmap.mmap | None) -> tuple[str, int]:
    """Return how a rank of this machine died, and an exit status for the job, which is not 0.

    Args:
        memory: shared memory of the rank, in which its guardian stores how it ended.
    """
    ended = None if memory is None or not memory[STATUS] else int.from_bytes(memory[STATUS + 1 :])
    ended = wait_status(pid) if ended is None else ended
    if ended is None:
        end, status = "died", 1
    elif os.WIFSIGNALED(ended):
        import signal

        number = os.WTERMSIG(ended)
        cause = " (the kernel does this when memory runs out)" if number == signal.SIGKILL else ""
        end, status = f"was killed by {signal.Signals(number).name}{cause}", 128 + number
    else:
        end, status = f"exited with status {os.WEXITSTATUS(ended)}", os.WEXITSTATUS(ended) or 1
    activity = read_activity(memory)
    return f"rank {rank} (process {pid}) {end}{f' in {activity}' if activity else ''}; the job ends", status


def wait_status(pid: int) -> int | None:
    """Return the status of a process that has ended, as ``os.waitpid`` does; 0 if it runs, None if it is gone."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return int(file.read().rpartition(")")[2].split()[49])
    except (OSError, IndexError):  # its parent has already waited for it
        return None


def _exit_info(process: int) -> int | None:
    """Return the status of an ended process from its pidfd, which Linux 6.15 and later keep after the wait."""
    information = bytearray(struct.pack("=Q56x", INFO_EXIT))
    try:
        fcntl.ioctl(process, PIDFD_GET_INFO, information)
    except OSError:
        return None
    (mask,), (status,) = struct.unpack_from("=Q", information), struct.unpack_from("=i", information, 60)
    return status if mask & INFO_EXIT else None


def read_activity(memory: mmap.mmap | None) -> str:
    """Return the activity in the shared memory of a rank; an empty string if it is not known."""
    return "" if memory is None else memory[:TEXT_BYTES].rstrip(b"\0").decode(errors="ignore")


def claim(memory: mmap.mmap | None) -> bool:
    """Return whether the caller is the first that reports the death of a rank; its guardian and other ranks may."""
    if memory is not None and memory[CLAIM]:
        return False
    if memory is not None:
        memory[CLAIM] = 1
    return True


def wait_until_read(descriptor: int) -> None:
    """Wait at most ``READ_S`` until the launcher has read the pipe, because an abort discards unread output."""
    deadline = time.monotonic() + READ_S
    while stat.S_ISFIFO(os.fstat(descriptor).st_mode) and time.monotonic() < deadline:
        unread = int.from_bytes(fcntl.ioctl(descriptor, termios.FIONREAD, bytes(4)), sys.byteorder)
        if unread == 0:
            return
        time.sleep(0.001)


def _guard(pid: int, connection: int, memory: mmap.mmap, rank: int, launcher: int) -> None:
    """Wait for the end of the rank. Unless it ends in order, wait for the end of the job, or end the job."""
    name = socket.socket(socket.AF_UNIX)
    ended = _await_death(pid)
    if ended == IN_ORDER:
        return
    try:
        name.bind(f"\0pipeline-mpi-{launcher}")
    except (
        OSError
    ):  # taken by the guardian of the rank that died first, in consequence of which mpirun kills the others
        os.close(connection)
        return
    memory[STATUS:] = b"\0\0\0" if ended is None else b"\1" + ended.to_bytes(2)
    message, status = describe_death(rank, pid, memory)
    poller = select.poll()
    poller.register(connection, 0)  # POLLHUP: mpirun has ended the job
    deadline = time.monotonic() + REPORT_S
    while not poller.poll(POLL_S * 1000):
        late = time.monotonic() > deadline
        # mpirun kills the other ranks when it has waited for a process that a signal ended
        killed = (ended is None or os.WIFSIGNALED(ended)) and not os.path.exists(f"/proc/{pid}")
        if (late or killed) and claim(memory):
            print(f"pipeline: {message}", file=sys.stderr, flush=True)
            wait_until_read(2)
        if late or killed or memory[CLAIM]:  # mpirun waits until no process can write to stderr
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        if late or (killed and ended is None):
            os.write(connection, f"cmd=abort exitcode={status}\n".encode())  # what MPI_Abort sends
        if late or killed:
            break
    os.close(connection)
    _wait_for(launcher, REPORT_S)  # while the name is taken


def _await_death(pid: int) -> int | None:
    """Return the wait status of the rank when it dies, or None if it is not known, or IN_ORDER."""
    poller = select.poll()
    poller.register(0, select.POLLIN)
    ended: int | None = None
    try:
        process = os.pidfd_open(pid)
        poller.register(process, select.POLLIN)
        while process not in (events := dict(poller.poll())):
            if events[0] & select.POLLIN:
                return IN_ORDER
            ended = wait_status(pid)  # files are closed first; a moment later, mpirun may have waited for the process
            poller.unregister(0)
        if events.get(0, 0) & select.POLLIN:
            return IN_ORDER
        ended = _exit_info(process) or ended
    except ProcessLookupError:  # it ended before this program had started
        pass
    return wait_status(pid) or ended


def _wait_for(pid: int, limit_s: float) -> None:
    """Wait at most ``limit_s`` seconds for the end of a process."""
    poller = select.poll()
    try:
        poller.register(os.pidfd_open(pid), select.POLLIN)
    except ProcessLookupError:
        return
    poller.poll(limit_s * 1000)


if __name__ == "__main__":
    _pid, _connection, _descriptor, _rank, _launcher = map(int, sys.argv[1:])
    _guard(_pid, _connection, mmap.mmap(_descriptor, MEMORY_BYTES), _rank, _launcher)
