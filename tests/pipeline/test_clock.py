"""The clocks of the engine. The CUDA clock runs with stand-ins for streams and events."""

import time
from types import SimpleNamespace

import pytest
import torch

from pipeline.clock import HostClock, StreamClock, clock_of


def test_host_clock_measures_the_host() -> None:
    clock = clock_of(torch.device("cpu"))
    assert type(clock) is HostClock
    start = clock.mark()
    time.sleep(0.01)
    assert 0.01 <= clock.seconds(start, clock.mark()) < 1


def test_stream_clock_measures_the_stream_and_waits_for_the_end_only(monkeypatch: pytest.MonkeyPatch) -> None:
    waited = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: SimpleNamespace) -> None:
            self.milliseconds = stream.milliseconds

        def synchronize(self) -> None:
            waited.append(self)

        def elapsed_time(self, end: "Event") -> float:
            return end.milliseconds - self.milliseconds

    streams = {torch.device("cuda", 1): SimpleNamespace(milliseconds=5.0)}
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams[device])
    clock = clock_of(torch.device("cuda", 1))
    assert type(clock) is StreamClock
    start = clock.mark()
    streams[torch.device("cuda", 1)].milliseconds = 255.0
    end = clock.mark()
    assert waited == []
    assert clock.seconds(start, end) == 0.25
    assert waited == [end]
