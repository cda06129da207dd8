"""Guardian: a small process next to each rank, so that no rank can die without a message or with status 0.

MPICH's ``mpirun`` notices the death of a rank when the rank's connection to it closes. It then kills the other ranks
at once, before they can report, and returns 0 if the rank called ``os._exit(0)``. The guardian holds the connection
open as well. When its rank dies, the other ranks therefore have ``REPORT_S`` seconds to report it (``watch.py``) and to
end the job. If they have not, for example because they have not reached ``init()`` yet, the guardian does both.

Open MPI and Slurm name the rank themselves. There, and on systems without ``pidfd_open``, no guardian is started.

This file is also the guardian's program, which imports only a few modules and needs 10 ms and 8 MB.
"""

import fcntl
import os
import select
import stat
import sys
import termios
import time

REPORT_S = 7.0  # longer than the other ranks need for a report
POLL_S = 0.05  # after the rank's death
READ_S = 1.0  # for the launcher to read what was printed

_lifeline: int | None = None  # written to when the rank ends in order


def start() -> None:
    """Start this rank's guardian, if ``mpirun`` is that of MPICH and it does not run yet."""
    global _lifeline
    if _lifeline is not None or not {"PMI_FD", "PMI_RANK", "HYDI_CONTROL_FD"} <= os.environ.keys():
        return
    if not hasattr(os, "pidfd_open"):
        return
    import atexit
    import subprocess

    read, _lifeline = os.pipe()
    connection = int(os.environ["PMI_FD"])
    subprocess.Popen(
        [sys.executable, "-ISE", __file__, str(os.getpid()), str(connection), os.environ["PMI_RANK"]],
        stdin=read,
        stdout=subprocess.DEVNULL,
        pass_fds=[connection],
        start_new_session=True,  # signals to the job are not for the guardian
    )
    os.close(read)
    atexit.register(release)  # the first function registered, thus the last one called


def release() -> None:
    """End the guardian, because this rank ends in order or ends the job itself."""
    if _lifeline is not None:
        os.write(_lifeline, b"!")


def describe_end(pid: int) -> tuple[str, int]:
    """Return how a process of this machine ended, and an exit status for the job, which is not 0."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:  # its parent has already asked for its status
        return "died without a message", 1
    ended = int(fields[49])  # the status as os.waitpid returns it; 0 as well if it may not be read
    if os.WIFSIGNALED(ended):
        import signal

        number = os.WTERMSIG(ended)
        memory = ", perhaps because memory ran out" if number == signal.SIGKILL else ""
        return f"was killed by {signal.Signals(number).name}{memory}", 128 + number
    status = os.WEXITSTATUS(ended)
    return f"exited with status {status} before the end of the job", status or 1


def wait_until_read(descriptor: int) -> None:
    """Wait at most ``READ_S`` until the launcher has read the pipe, because an abort discards unread output."""
    deadline = time.monotonic() + READ_S
    while stat.S_ISFIFO(os.fstat(descriptor).st_mode) and time.monotonic() < deadline:
        unread = int.from_bytes(fcntl.ioctl(descriptor, termios.FIONREAD, bytes(4)), sys.byteorder)
        if unread == 0:
            return
        time.sleep(0.001)


def _guard(pid: int, connection: int, rank: str) -> None:
    """Wait for the end of the rank. Unless it ends in order, wait for the end of the job, or end the job."""
    poller = select.poll()
    try:
        process = os.pidfd_open(pid)
        poller.register(process, select.POLLIN)
        poller.register(0, select.POLLIN)
        while events := dict(poller.poll()):
            if events.get(0, 0) & select.POLLIN:
                return
            if process in events:
                break
            poller.unregister(0)  # closed without a message, by exec
    except ProcessLookupError:
        pass  # it ended before this program had started
    poller = select.poll()
    poller.register(connection, 0)  # POLLHUP: mpirun has ended the job
    deadline = time.monotonic() + REPORT_S
    while time.monotonic() < deadline:
        if poller.poll(POLL_S * 1000):
            return
        if not os.path.exists(f"/proc/{pid}"):  # mpirun ends the job, and waits until no process can write to stderr
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    end, status = describe_end(pid)
    print(f"pipeline: rank {rank} (process {pid}) {end}; the job ends", file=sys.stderr, flush=True)
    wait_until_read(2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    os.write(connection, f"cmd=abort exitcode={status}\n".encode())  # what MPI_Abort sends
    poller.poll(REPORT_S * 1000)


if __name__ == "__main__":
    _guard(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
