"""Compare one training step of every schedule on all ranks with the same step on one rank."""

import math
import sys

import torch
import torch.distributed as dist

from fira.doctor.finding import ShowLine
from fira.doctor.limited_process import run_limited
from fira.doctor.one_step import PRESET, StepNumbers, one_step
from fira.models.registry import PRESETS, build
from fira.parallel.layout import choose_layout
from pipeline.mesh import Layout
from pipeline.mpi import World
from pipeline.schedule import SCHEDULES

LIMIT_S = 120.0
TOLERANCE = 1e-4  # relative; layouts differ by rounding only, an error in a schedule or a gradient is far larger


def check_schedules(world: World, device: torch.device, show_line: ShowLine) -> bool:
    """Train one step in every layout, print the comparison on rank 0, and return whether all agree (collective)."""
    sequences = 2 * world.size
    expected = reference(world, device, sequences)
    if isinstance(expected, str):
        show_line(f"one training step of {PRESET} on one rank failed: {expected}")
        return False
    show_line(
        f"one training step of {PRESET} on {world.size} ranks, compared with one rank: "
        f"loss {expected.loss:.6f}, gradient norm {expected.grad_norm:.6f}"
    )
    agree = True
    for layout, schedule in layouts(world.size):
        numbers = one_step(layout, schedule, device, sequences)
        difference = largest_difference(numbers, expected)
        agree &= difference <= TOLERANCE
        show_line(describe_comparison(layout, schedule, numbers, difference))
    return agree


def reference(world: World, device: torch.device, sequences: int) -> StepNumbers | str:
    """The same step on one rank, in a process without mpirun; or the reason why it failed (collective)."""
    box: list[StepNumbers | str] = [""]
    if world.rank == 0:
        words = [str(device), str(torch.get_num_threads()), str(sequences)]
        outcome = run_limited([sys.executable, "-m", "fira.doctor.one_step", *words], LIMIT_S)
        found = [StepNumbers(**numbers) for numbers in outcome.objects("loss")]
        box = [found[0] if found else outcome.last_lines(1) or "no output"]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def layouts(ranks: int) -> list[tuple[Layout, str]]:
    """Every schedule with as many pipeline stages as the model has layers for, then data and expert parallelism."""
    config = PRESETS[PRESET]
    with torch.device("meta"):
        layers = len(build(config).layers)
    found = []
    for name, spec in SCHEDULES.items():
        stages = max(n for n in range(1, ranks + 1) if ranks % n == 0 and n * spec.stages_per_rank <= layers)
        found.append((choose_layout(ranks, layers, config.num_experts, pp=stages), name))
    return [*found, (choose_layout(ranks, layers, config.num_experts, pp=1), "1f1b")]


def largest_difference(numbers: StepNumbers, expected: StepNumbers) -> float:
    """The larger relative difference of loss and gradient norm; infinity if one of them is not finite."""
    pairs = ((numbers.loss, expected.loss), (numbers.grad_norm, expected.grad_norm))
    return max(abs(a - b) / abs(b) if math.isfinite(a) else math.inf for a, b in pairs)


def describe_comparison(layout: Layout, schedule: str, numbers: StepNumbers, difference: float) -> str:
    """One row of the comparison."""
    verdict = "OK" if difference <= TOLERANCE else "DIFFERS"
    shown = "identical" if difference == 0 else f"{difference:.0e}"
    return f"  {schedule:<12}{layout!s:<22}{verdict:<9}{shown:<11}{numbers.seconds:.2f} s"
