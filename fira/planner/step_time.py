"""The step time of a candidate.

    step = simulated pipeline + what is visible of the gradient reduction over replicas + optimizer

"compute" + "exchange" is the mean work of a rank; "fill" + "uneven" is the pipeline bubble.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from fira.planner.candidate_costs import CandidateCosts
from fira.planner.candidates import Candidate, schedule_of
from fira.planner.memory import rank_memory
from fira.planner.reduction_time import visible_reduction
from fira.planner.update_time import update_seconds
from pipeline.schedule import ActionKind
from pipeline.simulate import Timeline, earliest_ends, simulate

MAX_FORWARDS = 10_000  # simulated per pipeline; further micro-batches are added at the pace of the slowest rank


@dataclass(frozen=True)
class Estimate:
    """The estimate of one candidate.

    breakdown: seconds of a step by cause, as the mean over ranks; their sum is the step time.
    reductions: by rank of the pipeline, seconds from its last action to the end of its gradient reduction.
    """

    candidate: Candidate
    seconds: float  # per step
    memory: tuple[float, ...]  # bytes, by rank of the pipeline
    breakdown: Mapping[str, float]
    timeline: Timeline | None  # of one pipeline; None if it was not simulated
    reductions: tuple[float, ...] = ()

    @property
    def bubble(self) -> float:
        """Fraction of the step in which ranks wait for one another in the pipeline."""
        return (self.breakdown["fill"] + self.breakdown["uneven"]) / self.seconds

    @property
    def bottleneck(self) -> str:
        """The largest cause other than computation; "compute" where that is at most a tenth of the step."""
        largest = max((name for name in self.breakdown if name != "compute"), key=self.breakdown.__getitem__)
        return largest if self.breakdown[largest] > 0.1 * self.seconds else "compute"


def predict(costs: CandidateCosts) -> Estimate:
    """Simulate a candidate's pipeline and add reduction and optimizer."""
    pp, count = costs.layout.pp, costs.candidate.count
    timeline = None
    if costs.is_simulated:
        stages = len(costs.placement)
        simulated = min(count, max(4 * stages, MAX_FORWARDS // stages))
        schedule = schedule_of(costs.candidate.schedule, pp, simulated)
        timeline = simulate(schedule, costs.actions, costs.transfer)
        remaining = (count - simulated) * max(costs.work)
        ends = [remaining + max((end for _, _, end in spans), default=0.0) for spans in timeline.spans]
    else:
        ends = _earliest_ends(costs)
    work = count * sum(costs.work) / pp
    ends = _with_shared_cores(costs, ends)
    spans = timeline.spans if timeline else [None] * pp
    reductions = tuple(visible_reduction(costs, rank, spans[rank]) for rank in range(pp))
    reduced = max(map(sum, zip(ends, reductions, strict=True)))
    length, mean_work, update = max(ends), sum(costs.work) / pp, update_seconds(costs)
    exchange = count * sum(sum(sum(costs.exchange[i]) for i in layers) for layers in costs.rank_layers) / pp
    uneven = min(length - work, count * (max(costs.work) - mean_work))
    breakdown = {
        "compute": work - exchange,
        "exchange": exchange,
        "fill": length - work - uneven,
        "uneven": uneven,
        "reduce": reduced - length,
        "optimizer": update,
    }
    return Estimate(costs.candidate, reduced + update, rank_memory(costs), breakdown, timeline, reductions)


def least_seconds(costs: CandidateCosts) -> float:
    """A lower bound of the step time, which holds for every schedule with the same stages."""
    ends = _with_shared_cores(costs, _earliest_ends(costs))
    ends = [end + visible_reduction(costs, rank) for rank, end in enumerate(ends)]
    return max(ends) + update_seconds(costs)


def _with_shared_cores(costs: CandidateCosts, ends: list[float]) -> list[float]:
    """[rank] the time at which its part of the pipeline ends if ranks share cores, from that of ranks without a wait.

    Costs are measured while all ranks compute. Where one waits, the others have its core: the pipeline is as long as
    with a core per rank, but not shorter than the mean work of a rank with its share of the cores.
    """
    cores = costs.hardware.cores
    if cores == 1:
        return ends
    work = costs.candidate.count * sum(costs.work) / costs.layout.pp
    return [max(cores * end, work) for end in ends]


def _earliest_ends(costs: CandidateCosts) -> list[float]:
    """[rank] lower bound of the time at which its part of the pipeline ends."""
    actions = costs.actions
    if not costs.splits_backward:
        actions = actions | {
            ActionKind.BACKWARD_INPUT: actions[ActionKind.BACKWARD],
            ActionKind.BACKWARD_WEIGHT: [0.0] * len(actions[ActionKind.BACKWARD]),
        }
    return earliest_ends(costs.placement, costs.candidate.count, actions, costs.transfer)
