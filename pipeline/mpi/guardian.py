"""Guardian: a small process next to each rank, so that no rank can die without a message or with status 0.

MPICH's ``mpirun`` notices the death of a rank when the rank's connection to it closes. It then kills the other ranks
before these can report, and returns 0 if the rank called ``os._exit(0)``. The guardian holds the connection open as
well. When its rank dies, the other ranks therefore have ``REPORT_S`` seconds to report it (``rank_watch.py``) and to
end the job. If they have not, because they have not reached ``init()`` yet, the guardian does both. After a signal,
``mpirun`` may still kill the other ranks at any moment; then the guardian prints the line that names the rank.

Open MPI and Slurm name the rank themselves. There, and on systems without ``pidfd_open``, no guardian is started.

This file is also the guardian's program, which imports only a few modules and needs 20 ms and 10 MB.
"""

import mmap
import os
import select
import socket
import stat
import struct
import sys
import time
from contextlib import suppress

REPORT_S = 7.0  # longer than the other ranks need for a report
POLL_S = 0.05  # after the rank's death
READ_S = 1.0  # for the launcher to read what was printed
PIDFD_GET_INFO, INFO_EXIT = 0xC040FF0B, 8  # include/uapi/linux/pidfd.h
IN_ORDER, ABORTING = b"i", b"a"  # messages to the guardian

# Shared memory of a rank: its activity, whether this is long, whether its death has been reported, and how it ended (0
# or 1, wait status)
TEXT_BYTES = 256
LONG, CLAIM, STATUS, MEMORY_BYTES = TEXT_BYTES, TEXT_BYTES + 1, TEXT_BYTES + 2, TEXT_BYTES + 5

_lifeline: int | None = None  # written to when the rank exits normally
_owner = -1  # the process of the rank; its forked children have the descriptor as well


def start(activity: int) -> None:
    """Start this rank's guardian, if ``mpirun`` is that of MPICH and it does not run yet.

    Args:
        activity: descriptor of the memory that contains this rank's activity; -1 if there is none.
    """
    global _lifeline, _owner
    if _lifeline is not None or not {"PMI_FD", "PMI_RANK", "HYDI_CONTROL_FD"} <= os.environ.keys():
        return
    connection, rank = int(os.environ["PMI_FD"]), os.environ["PMI_RANK"]
    if activity < 0 or not hasattr(os, "pidfd_open") or not _is_open(connection):
        return
    import atexit
    import subprocess

    read, write = os.pipe()
    try:
        subprocess.Popen(
            [sys.executable, "-ISE", __file__, *map(str, (os.getpid(), connection, activity, rank, os.getppid()))],
            stdin=read,
            stdout=subprocess.DEVNULL,
            pass_fds=[connection, activity],
            start_new_session=True,  # the guardian does not receive signals to the job
        )
    except OSError as error:  # no memory or no process is left
        print(
            f"pipeline: rank {rank} has no guardian ({error}): its death may be unreported", file=sys.stderr, flush=True
        )
        os.close(write)
        return
    finally:
        os.close(read)
    _lifeline, _owner = write, os.getpid()
    atexit.register(release)  # the first function registered, thus the last one called


def release(message: bytes = IN_ORDER) -> None:
    """Tell the guardian that this rank exits normally, or that it ends the job itself: ABORTING."""
    if _lifeline is not None and _owner == os.getpid():
        with suppress(BrokenPipeError):
            os.write(_lifeline, message)


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
        number = os.WTERMSIG(ended)
        end, status = f"was killed by {_signal_name(number)}", 128 + number
    else:
        end, status = f"exited with status {os.WEXITSTATUS(ended)}", os.WEXITSTATUS(ended) or 1
    activity = read_activity(memory)
    return f"rank {rank} (process {pid}) {end}{f' in {activity}' if activity else ''}; the job ends", status


def _signal_name(number: int) -> str:
    import signal

    if number == signal.SIGKILL:
        return "SIGKILL (the kernel does this when memory runs out)"
    try:
        return signal.Signals(number).name
    except ValueError:  # most real-time signals have no name
        return f"signal {number}"


def wait_status(pid: int) -> int | None:
    """Return the status of a process that has ended, as ``os.waitpid`` does; 0 if it runs, None if it is gone."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return int(file.read().rpartition(")")[2].split()[49])
    except (OSError, IndexError):  # its parent has already waited for it
        return None


def _exit_info(process: int) -> int | None:
    """Return the status of an ended process from its pidfd, which Linux 6.15 and later keep after the wait."""
    import fcntl  # here and below, because Windows has none

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
    import fcntl
    import termios

    deadline = time.monotonic() + READ_S
    while stat.S_ISFIFO(os.fstat(descriptor).st_mode) and time.monotonic() < deadline:
        unread = int.from_bytes(fcntl.ioctl(descriptor, termios.FIONREAD, bytes(4)), sys.byteorder)
        if unread == 0:
            return
        time.sleep(0.001)


def _is_open(descriptor: int) -> bool:
    """Return whether the descriptor is open; a child process of a rank has its environment, but not its connection."""
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def _guard(pid: int, connection: int, memory: mmap.mmap, rank: int, launcher: int) -> None:
    """Wait for the end of the rank. Unless it exits normally, wait for the end of the job, or end the job."""
    name = socket.socket(socket.AF_UNIX)
    process = _open_process(pid)
    ended = _await_end(pid, process)
    if ended == IN_ORDER:
        return
    try:  # Only the guardian of the rank that dies first binds the name; mpirun kills the other ranks afterwards.
        name.bind(f"\0pipeline-mpi-{launcher}")
    except OSError:
        return
    if not isinstance(ended, bytes):
        memory[STATUS:] = b"\0\0\0" if ended is None else b"\1" + ended.to_bytes(2)
        _end_job(pid, ended, connection, memory, rank)
    os.close(connection)
    _wait_for(launcher, REPORT_S)  # the name stays bound


def _end_job(pid: int, ended: int | None, connection: int, memory: mmap.mmap, rank: int) -> None:
    """Wait until the other ranks have reported the death and ended the job, or do so.

    Args:
        ended: the wait status of the rank; None if it is not known.
    """
    message, status = describe_death(rank, pid, memory)
    poller = select.poll()
    poller.register(connection, 0)  # POLLHUP: mpirun has ended the job
    deadline = time.monotonic() + REPORT_S
    late = killed = silent = False
    while not (late or killed or poller.poll(POLL_S * 1000)):
        late = time.monotonic() > deadline
        # mpirun kills the other ranks when it has waited for a process that a signal ended
        killed = (ended is None or os.WIFSIGNALED(ended)) and not os.path.exists(f"/proc/{pid}")
        if (late or killed) and claim(memory):
            print(f"pipeline: {message}", file=sys.stderr, flush=True)
            wait_until_read(2)
        if memory[CLAIM] and not silent:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # mpirun waits until no process can write to stderr
            silent = True
    if late or (killed and ended is None):
        os.write(connection, f"cmd=abort exitcode={status}\n".encode())  # what MPI_Abort sends


def _open_process(pid: int) -> int | None:
    """Return a descriptor that becomes readable when the process ends; None if it is gone."""
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None


def _await_end(pid: int, process: int | None) -> bytes | int | None:
    """Return the rank's message when it exits normally or ends the job; else its wait status, or None if unknown.

    Args:
        process: as ``_open_process`` returns it.
    """
    if process is None:
        return None
    poller = select.poll()
    poller.register(0, select.POLLIN)
    poller.register(process, select.POLLIN)
    ended: int | None = None
    events: dict[int, int] = {}
    while process not in events:
        events = dict(poller.poll())
        if events.get(0, 0) & select.POLLIN:
            return os.read(0, 1)
        if 0 in events:  # closed, as all files before a process ends; soon mpirun may have waited for it
            ended = wait_status(pid)
            poller.unregister(0)
    known = (status for status in (_exit_info(process), wait_status(pid), ended) if status is not None)
    return next(known, None)


def _wait_for(pid: int, limit_s: float) -> None:
    """Wait at most ``limit_s`` seconds for the end of a process."""
    process = _open_process(pid)
    if process is not None:
        poller = select.poll()
        poller.register(process, select.POLLIN)
        poller.poll(limit_s * 1000)


if __name__ == "__main__":
    _pid, _connection, _descriptor, _rank, _launcher = map(int, sys.argv[1:])
    _guard(_pid, _connection, mmap.mmap(_descriptor, MEMORY_BYTES), _rank, _launcher)
