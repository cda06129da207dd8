"""The timeline of a predicted step with all of its ranks: pipeline, gradient reduction and optimizer."""

from collections.abc import Sequence
from typing import NamedTuple

from fira.planner.step_time import Estimate
from pipeline.simulate import Timeline
from pipeline.timeline import Phase

MAX_RANKS = 16  # with a row each; with more, the ranks of all replicas of a pipeline rank share one


class StepTimeline(NamedTuple):
    """The rows of the timeline have the names `rows`."""

    timeline: Timeline
    phases: list[Phase]
    rows: list[str]


def step_timeline(estimate: Estimate) -> StepTimeline:
    """Return the timeline of a step from that of one of its pipelines, which must have been simulated.

    The optimizer begins when the gradients of all ranks have been reduced. The replicas of a pipeline rank do the same
    at the same time.
    """
    timeline = estimate.timeline
    assert timeline is not None
    dp, world = estimate.candidate.layout.dp, estimate.candidate.layout.world
    ranks = [[rank] for rank in range(world)] if world <= MAX_RANKS else _by_pipeline_rank(world, dp)
    spans = [timeline.spans[group[0] // dp] for group in ranks]
    begins = [own[-1][2] if own else 0.0 for own in spans]
    ends = [begin + estimate.reductions[group[0] // dp] for begin, group in zip(begins, ranks, strict=True)]
    update = estimate.breakdown["optimizer"]
    phases = [
        Phase(row, "gradient reduction", begin, end)
        for row, (begin, end) in enumerate(zip(begins, ends, strict=True))
        if end > begin
    ]
    phases += [Phase(row, "optimizer", max(ends), max(ends) + update) for row in range(len(ranks))]
    return StepTimeline(Timeline(tuple(spans)), phases, [_name(group) for group in ranks])


def _by_pipeline_rank(world: int, dp: int) -> list[Sequence[int]]:
    return [range(first, first + dp) for first in range(0, world, dp)]


def _name(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]:,}–{ranks[-1]:,}"
