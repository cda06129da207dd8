"""What a rank did last: a ring buffer of its operations, cheap to write and only read when something is wrong."""

import math
import os
import sys
import threading
import time
from collections import deque
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor

LAST = 256  # operations kept per rank
# numbered per peer and tag, not per group
POINT_TO_POINT = frozenset({"send", "recv", "recvAnySource", "monitored_barrier"})


class _Inside(dict[str, bool]):
    """Is a file part of torch or of this folder, which is not where a user looks for the cause?"""

    _folders = (os.path.dirname(torch.__file__) + os.sep, os.path.dirname(__file__) + os.sep)

    def __missing__(self, file: str) -> bool:
        self[file] = file.startswith(self._folders)
        return self[file]


_inside = _Inside()


class Entry:
    """One operation. As a context: this thread waits for it."""

    deadline = math.inf  # when the one who waits gives up by itself
    error: str | None = None
    finished: float | None = None
    waited_s = 0.0  # while the process was not stopped
    shape: torch.Size | None = None
    dtype: torch.dtype | None = None
    code: CodeType | None = None  # where it was called: a place in a function,
    at = -1  # whose line is looked up only when somebody asks

    def __init__(self, group: "GroupTrace", operation: str, number: int, peer: int, detail: Any) -> None:
        self.group = group
        self.operation = operation
        self.number = number
        self.peer = peer
        self.detail = detail
        self.started = time.time()

    def end(self, error: BaseException | None) -> None:
        """Note that the operation is over, well or badly."""
        self.finished = time.time()
        if waiting := self.group.trace.waiting:
            waiting.discard(self)
        if error is not None:
            self.error = str(error)  # the exception itself would keep its frames, and their tensors, alive

    def awaited(self) -> None:
        """Note that somebody waits for the end of the operation."""
        self.waited_s = 0.0
        self.group.trace.waiting.add(self)

    __enter__ = awaited

    def __exit__(self, *error: object) -> None:
        self.group.trace.waiting.discard(self)

    def as_json(self, waiting: bool) -> dict[str, Any]:
        """The entry in words and numbers; ranks are global."""
        ranks = self.group.ranks
        return {
            "operation": self.operation,
            "number": self.number,
            "group": self.group.name,
            "description": self.group.description,
            "ranks": ranks,
            "peer": ranks[self.peer] if self.peer >= 0 else None,
            "shape": None if self.shape is None else list(self.shape),
            "dtype": None if self.dtype is None else str(self.dtype).removeprefix("torch."),
            "detail": self.detail,
            "started": self.started,
            "finished": self.finished,
            "waited_s": self.waited_s if waiting else None,
            "error": self.error,
            "where": None if self.code is None else f"{self.code.co_filename}:{_line(self.code, self.at)}",
        }


class GroupTrace:
    """A process group as the trace knows it. It holds no communicator, so a destroyed group stays destroyed."""

    def __init__(self, trace: "Trace", ranks: list[int]) -> None:
        self.trace = trace
        self.ranks = ranks
        self.name = self.description = ""
        self._numbers: dict[Any, int] = {}

    def begin(self, operation: str, tensors: list[Tensor], peer: int = -1, detail: Any = None) -> Entry:
        """Note that an operation starts.

        Args:
            tensors: what is moved; the first one's shape and dtype are noted.
            peer: the other rank, or the root, in the group's own numbers; -1: none, or any.
            detail: a message's tag, or the sizes (sent, received) of an uneven all-to-all.
        """
        key = (operation, peer, detail) if operation in POINT_TO_POINT else None
        self._numbers[key] = number = self._numbers.get(key, 0) + 1
        entry = Entry(self, operation, number, peer, detail)
        if tensors:
            entry.shape, entry.dtype = tensors[0].shape, tensors[0].dtype
        frame: FrameType | None = sys._getframe(2)  # that of the group's own method
        while frame is not None and _inside[frame.f_code.co_filename]:
            frame = frame.f_back
        if frame is not None:
            entry.code, entry.at = frame.f_code, frame.f_lasti
        self.trace.last.append(entry)
        return entry


class Trace:
    """The last operations of this process, and those that a thread of it waits for."""

    def __init__(self) -> None:
        self.waiting: set[Entry] = set()
        self.last: deque[Entry] = deque(maxlen=LAST)

    def as_json(self) -> dict[str, Any]:
        """All that this process knows about itself."""
        waiting, last = self.waiting.copy(), list(self.last)
        entries = sorted(waiting.difference(last), key=lambda entry: entry.started) + last
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        frames = sys._current_frames()
        main = frames.get(threading.main_thread().ident or 0)
        return {
            "pid": os.getpid(),
            "time": time.time(),
            "now": _place(main),
            "operations": [entry.as_json(entry in waiting) for entry in entries],
            "stacks": {names.get(ident, str(ident)): _stack(frame) for ident, frame in frames.items()},
        }


def _line(code: CodeType, at: int) -> int:
    return next((line for start, end, line in code.co_lines() if start <= at < end and line), code.co_firstlineno)


def _stack(frame: FrameType | None) -> list[str]:
    """The calls that lead to ``frame``, innermost first."""
    places = []
    while frame is not None:
        places.append(_describe(frame))
        frame = frame.f_back
    return places


def _place(frame: FrameType | None) -> str | None:
    """Where in the user's code a thread is; None if no such code is running."""
    while frame is not None and _inside[frame.f_code.co_filename]:
        frame = frame.f_back
    return None if frame is None else _describe(frame)


def _describe(frame: FrameType) -> str:
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"
