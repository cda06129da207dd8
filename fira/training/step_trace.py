"""When each rank did what in one step, as a file that ui.perfetto.dev shows and a picture."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from fira.metrics.timeline_plot import write_timeline
from pipeline.engine import Engine
from pipeline.simulate import Timeline

STEP = 3  # of a run: the first ones are slow


@contextmanager
def traced(engine: Engine, out: str | None) -> Iterator[None]:
    """Note what the engine does inside, on all ranks, and write it to `out`; None: do nothing (collective)."""
    if out is None:
        yield
        return
    engine.trace = []
    dist.barrier()
    origin = time.perf_counter()  # ranks on several machines have clocks of their own
    yield
    mine = tuple((action, start - origin, end - origin) for action, start, end in engine.trace)
    engine.trace = None
    spans: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(spans, mine)
    if dist.get_rank() == 0:
        print(f"trace: {out}, {write_timeline(Timeline(tuple(spans), ()), out, f'step {STEP}')}", flush=True)
