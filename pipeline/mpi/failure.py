"""The end: one rank's failure ends all ranks, and the user reads one message.

With ``MPI_Abort`` alone every rank would print its copy of an error that all have in common (a bad flag, a bug). So a
failing rank first tells the others and listens for a second. If all ranks fail, the lowest prints its message and each
exits by itself; otherwise the lowest that failed prints and the job is aborted, whatever the other ranks wait for.
"""

import atexit
import ctypes
import fcntl
import gc
import os
import stat
import sys
import termios
import threading
import time
import traceback
from types import TracebackType
from typing import Any, NoReturn

LISTEN_S = 1.0
EXIT_S = 5.0  # a rank that exits by itself and is not gone by then is aborted


def fail(message: str, status: int = 1) -> NoReturn:
    """Print ``message`` once and end all ranks with ``status``. Before ``init()`` it ends this process alone."""
    if _job is None:
        print(message, file=sys.stderr)
    else:
        _job.end(message, status)
    raise SystemExit(status)


def abort(status: int) -> NoReturn:
    """End every rank at once. What this rank has written to stderr arrives, and nothing is added to it."""
    from mpi4py import MPI

    _wait_until_read(2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # MPICH would add a line that says less than ours
    MPI.COMM_WORLD.Abort(status)
    raise AssertionError("MPI_Abort returned")


def install(comm: Any, watch: Any) -> None:
    """From now on an uncaught exception, in any thread, and a non-zero ``SystemExit`` end all ranks of ``comm``."""
    global _job
    _job = _Job(comm, watch)
    sys.excepthook = _job.on_exception
    threading.excepthook = lambda args: _job.on_exception(args.exc_type, args.exc_value, args.exc_traceback)
    _watch_exit_status(_job)
    atexit.register(_job.leave)


class _Job:
    """All ranks, as seen from one that ends."""

    def __init__(self, comm: Any, watch: Any) -> None:
        self._watch = watch  # knows what the other ranks are doing
        self._comm = comm.Dup()  # of its own: nothing else can be in the way
        self._rank = comm.Get_rank()
        self._size = comm.Get_size()
        self._ending = threading.Lock()

    def on_exception(self, kind: type[BaseException], value: BaseException | None, trace: TracebackType | None) -> None:
        """For ``sys.excepthook`` and ``threading.excepthook``."""
        if issubclass(kind, KeyboardInterrupt):
            self.end("", 130)
        else:
            lines = "".join(traceback.format_exception(kind, value, trace))
            self.end(f"rank {self._rank} failed:\n{lines}", 1, explain=True)

    def end(self, message: str, status: int, explain: bool = False) -> None:
        """Return if every rank fails and can exit by itself; abort the job otherwise. The message is printed once."""
        if not self._ending.acquire(blocking=False):
            return
        failing = self._failing_ranks()
        if self._rank == min(failing) and message:
            print(message.rstrip("\n"), file=sys.stderr)
        if self._rank == min(failing) and explain:
            print(self._watch.after_failure(), end="", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        if len(failing) == self._size and threading.current_thread() is threading.main_thread():
            timer = threading.Timer(EXIT_S, abort, [status])
            timer.daemon = True
            timer.start()
            return
        if self._rank != min(failing):
            time.sleep(EXIT_S)  # the one that prints comes first
        abort(status)

    def _failing_ranks(self) -> set[int]:
        """This rank and those that say within ``LISTEN_S`` that they fail, too."""
        from mpi4py import MPI

        failing = {self._rank}
        for peer in range(self._size):
            if peer != self._rank:
                self._comm.Isend([b"", 0, MPI.BYTE], peer)
        status = MPI.Status()
        deadline = time.monotonic() + LISTEN_S
        while len(failing) < self._size and time.monotonic() < deadline:
            if self._comm.Iprobe(status=status):
                self._comm.Recv([bytearray(), 0, MPI.BYTE], status.Get_source())
                failing.add(status.Get_source())
            else:
                time.sleep(0.001)
        return failing

    def leave(self) -> None:
        """Wait for the other ranks before MPI's finalisation does: that would spin on a core they need."""
        self._barrier()
        self._watch.stop()
        self._barrier()  # a rank that has gone before another's watch stopped would be taken for dead

    def _barrier(self) -> None:
        everyone = self._comm.Ibarrier()
        while not everyone.Test():
            time.sleep(0.001)


def _wait_until_read(descriptor: int) -> None:
    """Wait, at most ``LISTEN_S``, until the launcher has read what was written: an abort would make it forget that."""
    deadline = time.monotonic() + LISTEN_S
    while stat.S_ISFIFO(os.fstat(descriptor).st_mode) and time.monotonic() < deadline:
        unread = int.from_bytes(fcntl.ioctl(descriptor, termios.FIONREAD, bytes(4)), sys.byteorder)
        if unread == 0:
            return
        time.sleep(0.001)


_job: _Job | None = None


def _watch_exit_status(job: _Job) -> None:
    """Call ``job.end`` when the interpreter is about to exit with a status other than 0.

    Python has no hook for an uncaught ``SystemExit``, and ``atexit`` is not told the status. But the interpreter reads
    the exception's ``code``, and only it reads it without a Python frame beneath. A wrapper of ``sys.exit`` would miss
    ``raise SystemExit``, and would see the ones that are caught.
    """
    attributes = gc.get_referents(SystemExit.__dict__)[0]  # the dictionary behind the read-only view
    original = attributes["code"]

    def code(error: SystemExit) -> Any:
        value = original.__get__(error)
        if value in (None, 0) or sys._getframe(0).f_back is not None:
            return value
        status = value if isinstance(value, int) else 1
        job.end("" if isinstance(value, int) else str(value), status)
        return status

    attributes["code"] = property(code, original.__set__, original.__delete__)
    ctypes.pythonapi.PyType_Modified(ctypes.py_object(SystemExit))
    sys.exit = _exit  # up to Python 3.11 the built-in one raises a bare status, never asked for its ``code``


def _exit(status: object = None, /) -> NoReturn:
    """``sys.exit``, which see."""
    raise SystemExit(status)
