"""Times of the work of a rank: on a CPU when the host does it, on CUDA when the device does it.

On CUDA the host only enqueues work, and waiting for a message blocks the stream instead of the host. Times are
therefore events in the stream, which are read after the work is done.
"""

import time
from typing import Any

import torch


class HostClock:
    """Marks are times of the host in seconds."""

    def mark(self) -> float:
        """A point in time."""
        return time.perf_counter()

    def seconds(self, start: Any, end: Any) -> float:
        """The time between two marks. Waits until the device has reached the second one."""
        return float(end - start)


class StreamClock(HostClock):
    """Marks are events in the current stream of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def seconds(self, start: Any, end: Any) -> float:
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3


def clock_of(device: torch.device) -> HostClock:
    return StreamClock(device) if device.type == "cuda" else HostClock()
