"""Trace of one step: start and end of each rank's actions, as a file for ui.perfetto.dev and a plot."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from fira.metrics.timeline_plot import write_timeline
from pipeline.engine import Engine
from pipeline.simulate import Timeline

TRACED_STEP = 3  # number of the traced step in this process; the first steps are slower than the others

logger = logging.getLogger(__name__)


@contextmanager
def traced(engine: Engine, path: str | None) -> Iterator[None]:
    """Trace the engine's actions on all ranks in the block and write them to `path` (collective); None: no trace."""
    if path is None:
        yield
        return
    engine.trace = []
    dist.barrier()
    origin = time.perf_counter()  # the zero of this rank's times, since machines have different clocks
    yield
    actions = tuple((action, start - origin, end - origin) for action, start, end in engine.trace)
    engine.trace = None
    spans: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(spans, actions)
    if dist.get_rank() == 0:
        picture = write_timeline(Timeline(tuple(spans)), path, f"step {TRACED_STEP}")
        logger.info("trace: %s, %s", path, picture)
