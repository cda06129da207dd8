"""Print the simulated gain of reducing gradients during the last backward: `python -m benchmarks.gpu.reduction`.

Nothing is measured: the planner computes all figures from the device descriptions in `fira/planner/devices/`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from fira.models.registry import PRESETS, build
from fira.planner.candidate_costs import CandidateCosts, PlanInputs
from fira.planner.candidates import Candidate
from fira.planner.costs import roofline_costs
from fira.planner.device_specs import load
from fira.planner.model_profile import ModelProfile, profile_of
from fira.planner.step_time import predict
from pipeline.mesh import Layout

MICROBATCH = 8  # sequences
PRECISION = {"h100": "bf16", "a100": "bf16", "t4": "fp16"}
PP, DP = (1, 2, 4), (2, 8, 64)


def gain(profile: ModelProfile, device: str, layout: Layout, schedule: str) -> tuple[float, float, float]:
    """Milliseconds of a step that the reduction takes after the pipeline, those that remain visible when it runs during
    the last backward, and the speed-up of the step."""
    microbatches = 1 if layout.pp == 1 else 2 * layout.pp
    candidate = Candidate(layout, schedule, MICROBATCH, microbatches, recompute=0)
    hardware, precision = load(device), PRECISION[device]
    cost_model = roofline_costs(profile, hardware, precision)
    after, during = (
        predict(
            CandidateCosts(
                PlanInputs(profile, replace(hardware, overlaps_collectives=overlaps), cost_model, precision), candidate
            )
        )
        for overlaps in (False, True)
    )
    return after.breakdown["reduce"] * 1e3, during.breakdown["reduce"] * 1e3, after.seconds / during.seconds - 1


def table(profile: ModelProfile, devices: Sequence[str], pp: Sequence[int], schedule: str) -> Iterator[str]:
    """A row per device and number of stages, a cell per number of replicas."""
    for device in devices:
        for stages in pp:
            cells = []
            for replicas in DP:
                after, during, speedup = gain(profile, device, Layout(stages, replicas, 1), schedule)
                cells.append(f"{after:.1f} → {during:.1f} ms, {speedup:+.1%}")
            yield f"| {device} | {stages} | {' | '.join(cells)} |"


def main() -> None:
    heading = f"| device | pp | {' | '.join(f'dp {replicas}' for replicas in DP)} |\n|{'---|' * (2 + len(DP))}"
    for name in sorted(preset for preset in PRESETS if preset.endswith("-base")):
        with torch.device("meta"):
            profile = profile_of(build(PRESETS[name]))
        devices, pp = (list(PRECISION), PP) if name == "fira-base" else (["h100"], PP[:2])
        for schedule in ("1f1b", "zb-h1") if name == "fira-base" else ("1f1b",):
            print(f"\n{name}, {schedule}\n\n{heading}")
            for row in table(profile, devices, pp if schedule == "1f1b" else PP[1:], schedule):
                print(row, flush=True)


if __name__ == "__main__":
    main()
