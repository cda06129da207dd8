"""The layout, schedule and micro-batch size of a run, where the flags do not give them.

    candidates ─ search: predicted step time ─ shortlist ─ trial_steps: measured step time ─ the fastest

Predictions are from the measured costs of layers. Trials end after TRIAL_SECONDS; the prediction decides where there
is no time for two of them. The result is cached by machine, model and flags.
"""

import math
import time
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
import torch.distributed as dist
from tqdm import tqdm

from fira.models.language_model import LanguageModel
from fira.models.registry import to_document
from fira.planner.best_candidates import plan_here
from fira.planner.candidates import Candidate, Constraints, candidates
from fira.planner.costs import element_size
from fira.planner.measure import least_memory
from fira.planner.measurement_cache import cached, machine_identity
from fira.planner.model_profile import profile_of
from fira.planner.step_time import Estimate
from fira.progress_bar import progress_bar
from fira.training.config import TrainConfig
from fira.training.trial_steps import STEPS, slowest_rank, trial_seconds
from pipeline.mesh import Layout
from pipeline.mpi import World
from pipeline.mpi.activity import doing

CONSIDERED = 200  # candidates whose order is predicted
COPIES = 5  # of a layer's weights in a measurement: weights, gradients, moments, and temporary tensors
PER_LAYOUT = 3  # of these candidates, the predicted fastest of each layout, are tried
TRIAL_SECONDS = 2.5  # of all trials
PROMISING = 1.5  # times the shortest predicted step: others are not tried
MORE_MEMORY = 2.0  # times that of a cached result, from which on it is repeated: other candidates may fit
EQUAL = 1.05  # times the shortest step: differences below it are not reproducible


@dataclass(frozen=True)
class Trial:
    """A candidate of the shortlist. predicted, measured: seconds of a step; measured is None without a trial."""

    candidate: Candidate
    predicted: float
    measured: float | None

    @property
    def seconds(self) -> float:
        return self.predicted if self.measured is None else self.measured

    @classmethod
    def of(cls, document: dict[str, Any]) -> Self:
        """The trial of `asdict`."""
        candidate = document["candidate"]
        layout = Layout(**candidate["layout"])
        return cls(Candidate(**candidate | {"layout": layout}), document["predicted"], document["measured"])

    def __str__(self) -> str:
        return describe(self.candidate)


def describe(candidate: Candidate) -> str:
    """The layout, schedule and micro-batches of a candidate, and the flags with which it saves memory."""
    count, size = candidate.count, candidate.microbatch
    batches = f"{count} micro-batches of {size}" if count > 1 else f"one micro-batch of {size}"
    schedule = f", {candidate.schedule}" if candidate.layout.pp > 1 else ""
    shard = f", --shard {candidate.shard}" if candidate.shard else ""
    recompute = f", --recompute {candidate.recompute}" if candidate.recompute else ""
    return f"{candidate.layout}{schedule}, {batches}{shard}{recompute}"


@dataclass(frozen=True)
class LayoutPlan:
    """Trials, the chosen one first. considered: the number of candidates."""

    trials: list[Trial]
    considered: int

    def __str__(self) -> str:
        best = self.trials[0]
        how = "predicted" if best.measured is None else "measured"
        text = f"{best}: {best.seconds * 1e3:,.0f} ms per step {how}, best of {self.considered:,} candidates"
        others = [trial for trial in self.trials if (trial.measured is None) == (best.measured is None)]
        others = [trial for trial in others if trial.candidate.layout != best.candidate.layout]
        if others:
            other = min(others, key=lambda trial: trial.seconds)
            text += f"; {other}: {other.seconds * 1e3:,.0f} ms"
        return text

    def table(self) -> str:
        """The trials as lines of text."""
        rows = [("candidate", "predicted", "measured")]
        for trial in self.trials:
            measured = "" if trial.measured is None else f"{trial.measured * 1e3:,.1f} ms"
            rows.append((str(trial), f"{trial.predicted * 1e3:,.1f} ms", measured))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            f"{a.ljust(widths[0])}  {b.rjust(widths[1])}  {c.rjust(widths[2])}".rstrip() for a, b, c in rows
        )


def constraints_of(config: TrainConfig, batch: int) -> Constraints:
    """The given settings as constraints of the planner."""
    return Constraints(
        batch,
        config.pp,
        config.dp,
        config.ep,
        config.schedule,
        config.micro_batch_size,
        config.recomputed(),
        config.shard,
    )


def is_planned(
    config: TrainConfig, model: LanguageModel, batch: int, devices: list[torch.device], world: World
) -> bool:
    """Whether the flags leave a choice, and each rank can hold the largest layer to measure it (collective).

    model: on the meta device. batch: sequences. torchgpipe's local devices are not planned for.
    """
    profile = profile_of(model)
    possible = candidates(profile, world.size, constraints_of(config, batch))
    choices = sum(1 for _ in zip(possible, range(2), strict=False))
    largest = max(sum(p.numel() for p in kind.layer.parameters()) for kind in profile.kinds)
    needed = COPIES * element_size(config.precision) * largest
    return len(devices) == 1 and choices > 1 and needed < least_memory(devices[0], world.local_size)


def plan_layout(
    config: TrainConfig,
    model: LanguageModel,
    batch: int,
    devices: list[torch.device],
    world: World,
    quiet: bool = False,
) -> LayoutPlan:
    """Find the fastest candidate with the given settings (collective).

    model: on the meta device. batch: sequences. Raises UserError if no candidate satisfies the flags or fits.
    """
    constraints = constraints_of(config, batch)
    key = [*machine_identity(devices[0], world), to_document(model.config), str(model.lora), config.precision]
    key += [asdict(constraints), asdict(config.optimizer_settings())]
    memory = least_memory(devices[0], world.local_size)

    def tried() -> dict[str, Any]:
        profile = profile_of(model, config.optimizer_settings().optimizer)
        result, _ = plan_here(profile, constraints, config.precision, world.size, devices[0], world, CONSIDERED)
        # Rank 0 decides: predictions differ between machines with different numbers of cores or ranks.
        ranked = shortlist_of(result.best)
        box = [[(estimate.candidate, estimate.seconds) for estimate in ranked]]
        dist.broadcast_object_list(box, src=0)
        shortlist = box[0]
        shown = world.rank == 0 and not quiet
        with progress_bar(len(shortlist), "measuring layouts", shown, " layouts") as bar:
            trials = _try(shortlist, model, batch, config, devices, bar)
        return {
            "trials": [asdict(trial) for trial in trials],
            "considered": result.candidates,
            "needed": max(max(estimate.memory) for estimate in ranked),
            "memory": memory,
        }

    with doing("plan of the layout", long=True):
        return cached(key, tried, plan_of, world, lambda found: is_for_memory(found, memory))


def plan_of(found: dict[str, Any]) -> LayoutPlan:
    """The plan of a stored result."""
    return LayoutPlan(in_order([Trial.of(trial) for trial in found["trials"]]), found["considered"])


def is_for_memory(found: dict[str, Any], memory: float) -> bool:
    """Whether a stored result has the candidates that fit into this memory of a rank, in bytes."""
    return bool(found["needed"] <= memory <= MORE_MEMORY * found["memory"])


def shortlist_of(estimates: list[Estimate]) -> list[Estimate]:
    """The PER_LAYOUT fastest of each layout, all first ones before all second ones.

    Of predictions that are equal in two digits, the one with fewer micro-batches is first: the fixed cost of a
    micro-batch is underestimated where it was extrapolated from small ones.
    """
    places: Counter[Layout] = Counter()
    ranked = []
    for estimate in sorted(estimates, key=lambda e: (float(f"{e.seconds:.2g}"), e.candidate.count)):
        ranked.append((places[estimate.candidate.layout], estimate))
        places[estimate.candidate.layout] += 1
    return [estimate for place in range(PER_LAYOUT) for its, estimate in ranked if its == place]


def _try(
    shortlist: list[tuple[Candidate, float]],
    model: LanguageModel,
    batch: int,
    config: TrainConfig,
    devices: list[torch.device],
    progress: tqdm,
) -> list[Trial]:
    """Measure the steps of candidates one after the other until the time has ended (collective).

    shortlist: candidates with the predicted seconds of a step, the same on all ranks.
    """
    trials: list[Trial] = []
    started, spent, best = time.perf_counter(), 0.0, math.inf
    shortest = min(predicted for _, predicted in shortlist)
    steps = max(1, min(STEPS, int(TRIAL_SECONDS / (3 * shortest)) - 1))  # so that three candidates can be tried
    enough = 2 * (1 + steps) * shortest < TRIAL_SECONDS
    for candidate, predicted in shortlist:
        measured, needed = None, (1 + steps) * predicted
        if enough and predicted < PROMISING * shortest and spent + needed < TRIAL_SECONDS:
            measured = trial_seconds(model, candidate, batch, config, devices, steps, best)
            best, spent = min(best, measured), slowest_rank(time.perf_counter() - started)
        trials.append(Trial(candidate, predicted, measured))
        progress.update(1)
    return trials


def in_order(trials: list[Trial]) -> list[Trial]:
    """The chosen trial, and then all others by their seconds, measured ones first.

    Of the trials that are about equally fast, one with a pipeline is chosen, and of these the predicted fastest.
    """
    ordered = sorted(trials, key=lambda trial: (trial.measured is None, trial.seconds))
    measured, limit = ordered[0].measured is not None, EQUAL * ordered[0].seconds
    equal = [trial for trial in ordered if (trial.measured is not None) == measured and trial.seconds <= limit]
    pipelines = [trial for trial in equal if trial.candidate.layout.pp > 1]
    chosen = min(pipelines or equal, key=lambda trial: trial.predicted)
    return [chosen, *(trial for trial in ordered if trial is not chosen)]
