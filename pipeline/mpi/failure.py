"""Job termination: the failure of one rank ends all ranks, and the user reads one message.

With ``MPI_Abort`` alone, every rank would print its copy of an error that all ranks have in common, such as a bad flag.
A failing rank therefore notifies the others and collects their notifications for ``NOTIFY_S`` seconds. If all ranks
fail, the lowest one prints its message and every rank exits on its own. Otherwise the lowest failing rank prints its
message and aborts the job, whatever the other ranks are waiting for.

| failure | detected by |
|---|---|
| uncaught exception | ``sys.excepthook``, ``threading.excepthook`` |
| non-zero ``SystemExit`` inside ``abort_on_failure()`` | the context manager |
| any other exit of one rank | ``atexit``: the exiting rank announces its exit, see ``rank_watch.py`` |
"""

import atexit
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, NoReturn

from pipeline.mpi import guardian, process_manager
from pipeline.mpi.activity import activity, activity_of, share

NOTIFY_S = 1.0
EXIT_S = 5.0  # a rank that has not exited on its own by then is aborted
DEATH_S = 5.0  # for the report of a rank's death, which can be the cause of an exception on other ranks
ANNOUNCE_S = 0.5  # a rank that waits longer than this for the others to exit announces its own exit


def fail(message: str, status: int = 1) -> NoReturn:
    """Print ``message`` once and end all ranks with exit status ``status``.

    Before ``init()`` only this process ends.

    Raises:
        SystemExit: if every rank fails, or before ``init()``. Otherwise the job is aborted.
    """
    if _job is not None:
        _job.end(message, status)
    elif message:
        print(message, file=sys.stderr)
    raise SystemExit(status)


@contextmanager
def abort_on_failure() -> Iterator[None]:
    """Context manager for the entry point of a program: if the block exits with a non-zero status, all ranks end.

    ``init()`` may be called inside the block. Uncaught exceptions end all ranks without this context manager as well.
    Python has no hook for ``SystemExit``: outside the block, a rank that exits with a non-zero status ends the job only
    when another rank waits for it. The exit status of the job is then that of ``sys.exit``, but 1 for a ``SystemExit``
    that was raised directly.
    """
    guardian.start(share())
    try:
        yield
    except SystemExit as error:
        if _job is None or error.code in (None, 0):
            raise
        if isinstance(error.code, int):
            fail(f"rank {_job.rank} exited with status {error.code}{_during(error)}", error.code)
        fail(str(error.code))


def abort(status: int) -> NoReturn:
    """End every rank at once. Output that this rank has already written to stderr is not lost."""
    from mpi4py import MPI

    guardian.release(guardian.ABORTING)
    guardian.wait_until_read(2)
    process_manager.abort(status)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # suppresses the line that MPICH adds, which has less information
    MPI.COMM_WORLD.Abort(status)
    raise AssertionError("MPI_Abort returned")


def install(comm: Any, watch: Any, close: Callable[[], None]) -> None:
    """Install the hooks by which the failure of this rank ends all ranks of ``comm``.

    Args:
        comm: a communicator of all ranks, an ``MPI.Intracomm``.
        watch: this rank's ``Watch``, which has the state of the other ranks.
        close: called at exit, when no rank uses its process groups any more and while all ranks still answer.
    """
    global _job
    _job = _Job(comm, watch, close)
    sys.excepthook = _job.on_exception
    threading.excepthook = _job.on_thread_exception
    sys.exit = _job.exit
    atexit.register(_job.leave)


class _Job:
    """All ranks of the job, from the point of view of one rank."""

    def __init__(self, comm: Any, watch: Any, close: Callable[[], None]) -> None:
        self._watch = watch
        self._close = close
        self._comm = comm.Dup()  # a private communicator: no other message can interfere
        self.rank = comm.Get_rank()
        self._size = comm.Get_size()
        self._ending = threading.Lock()
        self._exit_status, self._exit_activity = 0, ""

    def on_exception(self, kind: type[BaseException], value: BaseException | None, trace: TracebackType | None) -> None:
        """Replacement for ``sys.excepthook``."""
        if issubclass(kind, KeyboardInterrupt):
            self.end("", 130)
        else:
            lines = traceback.format_exception(kind, value, trace)
            self.end(f"rank {self.rank} failed{_during(value)}: {_summary(value)}\n{''.join(lines)}", 1, explain=True)

    def on_thread_exception(self, args: threading.ExceptHookArgs) -> None:
        """Replacement for ``threading.excepthook``, which ignores ``SystemExit`` as Python's own hook does."""
        if not issubclass(args.exc_type, SystemExit):
            self.on_exception(args.exc_type, args.exc_value, args.exc_traceback)

    def exit(self, status: Any = None, /) -> NoReturn:
        """Replacement for ``sys.exit`` that records the status, since ``atexit`` functions do not receive it."""
        if threading.current_thread() is threading.main_thread():
            self._exit_status = status if isinstance(status, int) else int(status is not None)
            self._exit_activity = activity()
        raise SystemExit(status)

    def end(self, message: str, status: int, explain: bool = False) -> None:
        """End all ranks. Return only if every rank fails and can exit on its own; otherwise abort the job.

        Args:
            message: printed by the lowest failing rank; may be empty.
            status: exit status of the job.
            explain: whether an exception is the cause: then the death of a rank has precedence, and what the other
                ranks were doing is printed. Collectives that differ are always printed.
        """
        if not self._ending.acquire(blocking=False):
            return
        failing = self._failing_ranks()
        if explain and self._watch.sees_death():
            time.sleep(DEATH_S)  # the report of the death, which may have caused the exception, ends the job
        if self.rank == min(failing) and message:
            print(message.rstrip("\n"), file=sys.stderr)
        if self.rank == min(failing):
            print(self._watch.after_failure(waits=explain), end="", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        if len(failing) == self._size and threading.current_thread() is threading.main_thread():
            timer = threading.Timer(EXIT_S, abort, [status])
            timer.daemon = True
            timer.start()
            return
        if self.rank != min(failing):
            time.sleep(EXIT_S)  # the rank that prints aborts the job first
        abort(status)

    def _failing_ranks(self) -> set[int]:
        """Return this rank and the ranks whose notification of failure arrives within ``NOTIFY_S``."""
        from mpi4py import MPI

        failing = {self.rank}
        for peer in range(self._size):
            if peer != self.rank:
                self._comm.Isend([b"", 0, MPI.BYTE], peer)
        status = MPI.Status()
        deadline = time.monotonic() + NOTIFY_S
        while len(failing) < self._size and time.monotonic() < deadline:
            if self._comm.Iprobe(status=status):
                self._comm.Recv([bytearray(), 0, MPI.BYTE], status.Get_source())
                failing.add(status.Get_source())
            else:
                time.sleep(0.001)
        return failing

    def leave(self) -> None:
        """Wait for the other ranks before ``MPI_Finalize`` does, because it would spin on a core that they need."""
        barrier, deadline = self._comm.Ibarrier(), time.monotonic() + ANNOUNCE_S
        with self._watch.begin_exit():  # the timeout applies to this wait as well
            while not barrier.Test():
                if time.monotonic() > deadline:
                    self._watch.announce_exit(self._exit_status, self._exit_activity)
                    deadline = float("inf")
                time.sleep(0.001)
        if self._exit_status and self._size > 1 and not self._ending.locked():
            print(f"rank {self.rank} exited with status {self._exit_status}", file=sys.stderr, flush=True)
        self._close()
        self._watch.stop()
        barrier = self._comm.Ibarrier()  # a rank that exits while another rank's watch runs would be reported as dead
        while not barrier.Test():
            time.sleep(0.001)


def _during(error: BaseException | None) -> str:
    """Return `` in <activity>`` if the activity in which an exception was raised is known."""
    text = "" if error is None else activity_of(error)
    return f" in {text}" if text else ""


def _summary(error: BaseException | None) -> str:
    """Return type and first line of the message of an exception."""
    return "".join(traceback.format_exception_only(error)).partition("\n")[0]


_job: _Job | None = None
