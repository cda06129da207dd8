"""Trace of one step: start and end of each rank's actions, as a file for ui.perfetto.dev and a plot."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from fira.checkpoint.ranks import collective_errors, this_rank
from fira.metrics.timeline_plot import check_writable, write_timeline
from pipeline.engine import Engine
from pipeline.simulate import Timeline

TRACED_STEP = 3  # number of the traced step in this process; the first steps are slower than the others

logger = logging.getLogger(__name__)


def check_trace(path: str | None) -> None:
    """Raise UserError on all ranks if no trace can be written to `path` (collective)."""
    if path is None:
        return
    with collective_errors():
        if this_rank() == 0:
            check_writable(path)


@contextmanager
def traced(engine: Engine, step: int, path: str | None) -> Iterator[None]:
    """Trace the engine's actions on all ranks in the block and write them to `path` (collective); None: no trace."""
    if path is None:
        yield
        return
    dist.barrier()  # times are relative to the start of the trace, since machines have different clocks
    engine.start_trace()
    try:
        yield
    finally:
        trace = tuple(engine.stop_trace())
    spans: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(spans, trace)
    if dist.get_rank() == 0:
        picture = write_timeline(Timeline(tuple(spans)), path, f"step {step}")
        logger.info("trace: %s, %s", path, picture)
