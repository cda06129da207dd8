"""What this process is doing, for error messages and hang reports, also after it was stopped or killed.

    with doing("step 7"):
        with doing("backward of stage 1, micro-batch 3"):
            ...    # current activity: "step 7, backward of stage 1, micro-batch 3"

The text is in shared memory, which the other ranks of the machine map at the start. A block takes about 3 µs.
"""

import math
import mmap
import os
import threading
import time
from types import TracebackType
from typing import Self

from pipeline.mpi.guardian import LONG, MEMORY_BYTES, TEXT_BYTES

NOTE = "activity: "  # begins the note that an exception gets

_MAIN_THREAD = threading.main_thread().ident
_blocks: list["doing"] = []  # that the main thread is in, outermost first
_long_ended = -math.inf  # end of the last long activity (time.monotonic)
_memory: mmap.mmap | None = None
_descriptor = -1  # of the memory


class doing:
    """Context manager that states what this process does in the block. It has no effect outside the main thread.

    An exception that leaves the block gets a note with the activity.

    Args:
        text: such as ``step 7`` or ``validation``.
        long: whether the block may take longer than the timeout of the job. Other ranks may wait for this rank as long
            as it uses the CPU.
    """

    def __init__(self, text: str, long: bool = False) -> None:
        self.text = text  # in the block, with the texts of the blocks around it
        self.long = long

    def __enter__(self) -> Self:
        if threading.get_ident() == _MAIN_THREAD:
            if _blocks:
                self.text = f"{_blocks[-1].text}, {self.text}"
                self.long = self.long or _blocks[-1].long
            _blocks.append(self)
            _publish()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _long_ended
        if threading.get_ident() == _MAIN_THREAD:
            if error is not None and not activity_of(error):
                error.add_note(NOTE + activity())
            _blocks.pop()
            if self.long and not is_long():
                _long_ended = time.monotonic()
            _publish()


def activity() -> str:
    """Return what this process is doing; an empty string outside all contexts."""
    return _blocks[-1].text if _blocks else ""


def is_long() -> bool:
    """Return whether the current activity may take longer than the timeout of the job."""
    return bool(_blocks) and _blocks[-1].long


def seconds_since_long() -> float:
    """Return the seconds since the last long activity ended; 0 during one, infinity if there was none."""
    return 0.0 if is_long() else time.monotonic() - _long_ended


def activity_of(error: BaseException) -> str:
    """Return the activity in which an exception was raised; an empty string if it is not known."""
    notes = [note for note in getattr(error, "__notes__", ()) if note.startswith(NOTE)]
    return notes[0].removeprefix(NOTE) if notes else ""


def share() -> int:
    """Put the activity into shared memory. Return its descriptor, which others open; -1 if it is not possible."""
    global _memory, _descriptor
    if _memory is None and hasattr(os, "memfd_create"):
        try:
            _descriptor = os.memfd_create("activity")
        except OSError:  # a sandbox
            return -1
        os.ftruncate(_descriptor, MEMORY_BYTES)
        _memory = mmap.mmap(_descriptor, MEMORY_BYTES)
        _publish()
    return _descriptor


def open_activity(pid: int, descriptor: int) -> mmap.mmap | None:
    """Map the shared memory of another process of this machine; None if it is not possible."""
    try:
        with open(f"/proc/{pid}/fd/{descriptor}", "r+b") as file:
            return mmap.mmap(file.fileno(), MEMORY_BYTES)
    except OSError:
        return None


def _publish() -> None:
    if _memory is not None:
        _memory[:TEXT_BYTES] = activity().encode()[:TEXT_BYTES].ljust(TEXT_BYTES, b"\0")
        _memory[LONG] = is_long()
