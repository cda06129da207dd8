"""Report of a plan: a table of the best candidates, the bottleneck of the best one, and the command that trains it."""

import shlex
from collections.abc import Sequence

from fira import cli
from fira.parallel.parallelize import EVERY_BLOCK
from fira.planner.candidates import Candidate
from fira.planner.device_specs import Hardware
from fira.planner.search import SearchResult
from fira.planner.step_time import Estimate

CAUSES = {
    "compute": "compute",
    "exchange": "experts' all-to-all",
    "fill": "pipeline fills and drains",
    "uneven": "uneven stages",
    "reduce": "gradient reduction",
    "optimizer": "optimizer",
}
HEADINGS = ("", "pp × dp (ep)", "schedule", "micro-batches", "step", "tokens/s", "bubble", "memory", "compute")


def describe_plan(result: SearchResult, hardware: Hardware, precision: str, tokens: int, command: Sequence[str]) -> str:
    """A table of the best candidates; for the first of them the breakdown of its step time and the command line.

    tokens: per batch. command: the flags of the training command that the planner does not choose.
    """
    best = result.best[0]
    rows = [HEADINGS, *(_row(n, estimate, tokens) for n, estimate in enumerate(result.best, 1))]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADINGS))]
    table = [
        "  ".join(
            cell.ljust(w) if i < 4 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    shares = ", ".join(
        f"{CAUSES[name]} {seconds / best.seconds:.0%}"
        for name, seconds in best.breakdown.items()
        if seconds > 0.0005 * best.seconds
    )
    too_large = f"; {result.too_large:,} that might be faster do not fit into memory" if result.too_large else ""
    return "\n".join(
        [
            *(line.rstrip() for line in table),
            "",
            f"the best of {result.candidates:,} candidates on {hardware.name} in {precision}, "
            f"{hardware.memory / 1e9:.1f} GB per rank{too_large}",
            f"step: {shares}",
            f"bottleneck: {CAUSES[best.bottleneck]}",
            "memory by rank of the pipeline: " + _ranges([f"{size / 1e9:.2f} GB" for size in best.memory]),
            "",
            command_line(best.candidate, command),
        ]
    )


def command_line(candidate: Candidate, command: Sequence[str]) -> str:
    """The shell command that trains this candidate."""
    layout = candidate.layout
    mpirun = f"mpirun -np {layout.world} " if layout.world > 1 else ""
    return mpirun + shlex.join([*cli.command_words("train"), *command, *flags(candidate)])


def flags(candidate: Candidate) -> list[str]:
    """The flags of train.py that choose this candidate."""
    values: dict[str, object] = {
        "pp": candidate.layout.pp,
        "dp": candidate.layout.dp,
        "ep": candidate.layout.ep,
        "schedule": candidate.schedule,
        "micro-batch-size": candidate.microbatch,
    }
    if candidate.shard:
        values["shard"] = candidate.shard
    if candidate.recompute:
        values["recompute"] = recompute_flag(candidate)
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def recompute_flag(candidate: Candidate) -> str:
    """The value of --recompute for this candidate."""
    return {0: "none", EVERY_BLOCK: "full"}.get(candidate.recompute, str(candidate.recompute))


def _row(number: int, estimate: Estimate, tokens: int) -> tuple[str, ...]:
    candidate = estimate.candidate
    return (
        str(number),
        f"{candidate.layout.pp} × {candidate.layout.dp} ({candidate.layout.ep})",
        candidate.schedule
        + (f" shard {candidate.shard}" if candidate.shard else "")
        + (f" recompute {recompute_flag(candidate)}" if candidate.recompute else ""),
        f"{candidate.count} of {candidate.microbatch}",
        describe_seconds(estimate.seconds),
        f"{tokens / estimate.seconds:,.0f}",
        f"{estimate.bubble:.1%}",
        f"{max(estimate.memory) / 1e9:.2f} GB",
        f"{estimate.breakdown['compute'] / estimate.seconds:.0%}",
    )


def describe_seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def _ranges(values: list[str]) -> str:
    """Join values, with repeated ones counted: 3 GB, 2 GB (× 14), 5 GB."""
    groups: list[tuple[str, int]] = []
    for value in values:
        if groups and groups[-1][0] == value:
            groups[-1] = value, groups[-1][1] + 1
        else:
            groups.append((value, 1))
    return ", ".join(value if n == 1 else f"{value} (× {n})" for value, n in groups)
