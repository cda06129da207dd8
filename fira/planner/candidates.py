"""Enumerate the candidate layouts for training a model on a number of ranks."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from fira.planner.model_profile import ModelProfile
from pipeline.mesh import Layout
from pipeline.schedule import SCHEDULES, Schedule


@dataclass(frozen=True)
class Constraints:
    """The settings that every candidate must have; the planner chooses those that are None.

    It chooses `shard` only for candidates that do not fit otherwise; "none" excludes this.
    """

    batch: int  # sequences
    pp: int | None = None
    dp: int | None = None
    ep: int | None = None
    schedule: str | None = None
    microbatch: int | None = None
    recompute: int | None = None
    shard: str | None = None

    @property
    def candidate_shard(self) -> str | None:
        """`Candidate.shard` before the planner divides more: None where nothing is divided."""
        return None if self.shard == "none" else self.shard


@dataclass(frozen=True)
class Candidate:
    """A layout and schedule in which every replica runs `count` micro-batches of `microbatch` sequences."""

    layout: Layout
    schedule: str
    microbatch: int
    count: int
    recompute: int  # blocks of every stage
    shard: str | None = None  # what the replicas divide: "optimizer" or "parameters"


def candidates(profile: ModelProfile, ranks: int, constraints: Constraints) -> Iterator[Candidate]:
    """Yield every valid candidate.

    Layouts with more replicas than sequences are left out, and so are schedules other than 1F1B for a single stage.
    Micro-batch sizes are the powers of two and the number of sequences per replica. No candidate recomputes blocks
    unless the constraints require it.
    """
    for pp in _divisors(ranks):
        if pp > len(profile.layers):
            break
        dp = ranks // pp
        if constraints.pp not in (None, pp) or constraints.dp not in (None, dp) or dp > constraints.batch:
            continue
        share = -(-constraints.batch // dp)
        sizes = {share, *(2**n for n in range(share.bit_length()))}
        names = [constraints.schedule] if constraints.schedule else list(SCHEDULES) if pp > 1 else ["1f1b"]
        for name in names:
            if pp * SCHEDULES[name].stages_per_rank > len(profile.layers):
                continue
            for ep in _divisors(dp):
                if profile.num_experts % ep or constraints.ep not in (None, ep):
                    continue
                for size in sorted(sizes) if constraints.microbatch is None else [constraints.microbatch]:
                    count = -(-constraints.batch // (size * dp))
                    layout, recompute = Layout(pp, dp, ep), constraints.recompute or 0
                    yield Candidate(layout, name, size, count, recompute, constraints.candidate_shard)


@cache
def schedule_of(name: str, pp: int, microbatches: int) -> Schedule:
    return SCHEDULES[name].builder(pp, microbatches)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
