"""Trace of a rank: a ring buffer of its last operations that is cheap to write and read only for a report."""

import functools
import math
import os
import sys
import threading
import time
import traceback
import zlib
from collections import deque
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor

from pipeline.mpi.activity import activity, seconds_since_long

LAST = 256  # operations kept per rank
# operations whose tensors have the same size on every rank in every valid program
EQUAL_SIZES = frozenset({"all_reduce", "all_reduce_coalesced", "reduce", "broadcast"})
SIGNATURES, WEIGHTS = 2**16, 2**8  # possible values, so that sums of checksums are exact in float64
# operations that are numbered per peer and tag instead of per group
POINT_TO_POINT = frozenset({"send", "recv", "recvAnySource", "monitored_barrier"})


_INTERNAL = (os.path.dirname(torch.__file__) + os.sep, os.path.dirname(__file__) + os.sep)


@functools.cache
def _is_internal(file: str) -> bool:
    """Return whether a file belongs to torch or to this folder, and is skipped when a caller is looked up."""
    return file.startswith(_INTERNAL)


@functools.cache
def _code(operation: str, dtype: torch.dtype | None) -> tuple[int, bool]:
    """Return a number for an operation and a dtype, and whether the sizes of its tensors are equal on all ranks."""
    return zlib.crc32(f"{operation} {dtype}".encode()), operation in EQUAL_SIZES


class Entry:
    """One operation. As a context manager: the operation is waited for in the block."""

    deadline = math.inf  # time at which the waiting caller raises
    error: str | None = None
    finished: float | None = None
    waited_s = 0.0  # without time in which the process was stopped
    shape: torch.Size | None = None
    dtype: torch.dtype | None = None
    code: CodeType | None = None  # the calling function and
    at = -1  # the position in it, whose line number is looked up only for a report

    def __init__(self, group: "GroupTrace", operation: str, number: int, peer: int, detail: Any) -> None:
        self.group = group
        self.operation = operation
        self.number = number
        self.peer = peer
        self.detail = detail
        self.started = time.time()

    def end(self, error: BaseException | None) -> None:
        """Record that the operation has ended, with or without an error."""
        self.finished = time.time()
        if waiting := self.group.trace.waiting:
            waiting.discard(self)
        if error is not None:
            self.error = str(error)  # the exception itself would keep its frames, and their tensors, alive

    def awaited(self) -> None:
        """Record that a thread waits for the end of the operation."""
        self.waited_s = 0.0
        self.group.trace.waiting.add(self)

    __enter__ = awaited

    def __exit__(self, *error: object) -> None:
        self.group.trace.waiting.discard(self)

    def as_json(self, waiting: bool) -> dict[str, Any]:
        """Return the entry as a JSON object with global ranks.

        Args:
            waiting: whether a thread waits for the operation.
        """
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
    """Names, ranks and operation counts of a process group.

    It does not refer to the communicator, so that the trace does not keep a destroyed group alive.
    """

    def __init__(self, trace: "Trace", ranks: list[int]) -> None:
        self.trace = trace
        self.ranks = ranks
        self.name = self.description = ""
        self.signature = 0  # of the collectives so far, equal on all members
        self._numbers: dict[Any, int] = {}
        self.weight = zlib.crc32(repr(ranks).encode()) % WEIGHTS + 1  # equal differences in two groups must not cancel
        trace.groups.append(self)

    def begin(self, operation: str, tensors: list[Tensor], peer: int = -1, detail: Any = None) -> Entry:
        """Record the start of an operation.

        Args:
            operation: its name.
            tensors: its tensors; shape and dtype of the first one are recorded.
            peer: the other rank or the root, relative to the group; -1 for none or any.
            detail: tag of a message, or (input sizes, output sizes) of an uneven all-to-all.
        """
        key = (operation, peer, detail) if operation in POINT_TO_POINT else None
        self._numbers[key] = number = self._numbers.get(key, 0) + 1
        entry = Entry(self, operation, number, peer, detail)
        if tensors:
            entry.shape, entry.dtype = tensors[0].shape, tensors[0].dtype
        if key is None:
            code, has_equal_sizes = _code(operation, entry.dtype)
            size = tensors[0].numel() if tensors and has_equal_sizes else 0
            self.signature = (self.signature * 31 + code + size) % SIGNATURES
        frame: FrameType | None = sys._getframe(2)  # the caller's frame
        while frame is not None and _is_internal(frame.f_code.co_filename):
            frame = frame.f_back
        if frame is not None:
            entry.code, entry.at = frame.f_code, frame.f_lasti
        self.trace.last.append(entry)
        return entry


class Trace:
    """The last operations of this process, and the operations that its threads wait for."""

    def __init__(self) -> None:
        self.waiting: set[Entry] = set()
        self.last: deque[Entry] = deque(maxlen=LAST)
        self.groups: list[GroupTrace] = []

    def checksum(self, rank: int) -> int:
        """Return a number whose sum over all ranks is 0 if the members of each group called equal collectives.

        A member adds its signature, weighted by its position in the group, and the first member subtracts
        the same for all of them. For 10,000 ranks, the numbers and their sums are exact in float64.

        Args:
            rank: global rank of this process.
        """
        total = 0
        for group in self.groups:
            position, size = group.ranks.index(rank), len(group.ranks)
            factor = position if position else -size * (size - 1) // 2
            total += group.signature * group.weight * factor
        return total

    def as_json(self) -> dict[str, Any]:
        """Return the snapshot of this process: operations, stacks of all threads, activity and times."""
        waiting, last = self.waiting.copy(), list(self.last)
        entries = sorted(waiting.difference(last), key=lambda entry: entry.started) + last
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        frames = sys._current_frames()
        main = frames.get(threading.main_thread().ident or 0)
        return {
            "pid": os.getpid(),
            "time": time.time(),
            "now": _place(main),
            "activity": activity(),
            "since_long_s": seconds_since_long(),
            "cpu_s": time.process_time(),
            "operations": [entry.as_json(entry in waiting) for entry in entries],
            "stacks": {names.get(ident, str(ident)): _stack(frame) for ident, frame in frames.items()},
        }


def _line(code: CodeType, at: int) -> int:
    return next((line for start, end, line in code.co_lines() if start <= at < end and line), code.co_firstlineno)


def _stack(frame: FrameType) -> list[str]:
    """Return the calls that lead to ``frame``, innermost first."""
    return [_describe(caller) for caller, _ in traceback.walk_stack(frame)]


def _place(frame: FrameType | None) -> str | None:
    """Return the line of user code that a thread executes; None if it executes no user code."""
    while frame is not None and _is_internal(_file(frame)):
        frame = frame.f_back
    return None if frame is None else _describe(frame)


def _file(frame: FrameType) -> str:
    """Return the file of a frame's code; a placeholder if the thread, which still runs, has just left the frame."""
    return getattr(frame.f_code, "co_filename", "unknown")


def _describe(frame: FrameType) -> str:
    return f"{_file(frame)}:{frame.f_lineno} in {getattr(frame.f_code, 'co_name', 'unknown')}"
