"""Draw the timelines of 1F1B and ZB-H1, simulated and measured, for the README.

    python -m benchmarks.planner.timelines

Two ranks train fira-tiny under both schedules with --trace; plan.py simulates the same configurations with --timeline.
Writes timelines.png to the folder of this file.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from fira.metrics.timeline_plot import draw_timelines
from pipeline.simulate import Timeline
from pipeline.timeline import read_trace

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
MODEL = ["--model-set", "d_model=256,d_ff=512", "--batch-size", "12", "--micro-batch-size", "2"]


def from_zero(timeline: Timeline) -> Timeline:
    """Shift a timeline so that its first action starts at zero. A measured one begins with preparing the batch."""
    zero = min(spans[0][1] for spans in timeline.spans)
    return Timeline(tuple(tuple((a, s - zero, e - zero) for a, s, e in spans) for spans in timeline.spans))


def main() -> None:
    panels = {}
    with tempfile.TemporaryDirectory() as folder:
        for schedule in ("1f1b", "zb-h1"):
            constraints = [*MODEL, "--pp", "2", "--schedule", schedule]
            simulated, measured = Path(folder) / "simulated.json", Path(folder) / "measured.json"
            start("plan.py", *constraints, "--recompute", "none", "--ranks", "2", "--top", "1", "--timeline", simulated)
            run = ["--steps", "4", "--eval-sequences", "2", "--out", Path(folder) / schedule]
            start("train.py", *constraints, *run, "--trace", measured)
            panels[f"{schedule}, simulated"] = from_zero(read_trace(simulated))
            panels[f"{schedule}, measured"] = from_zero(read_trace(measured))
    draw_timelines(panels, HERE / "timelines.png", columns=2)


def start(script: str, *flags: object) -> None:
    command = ["mpirun", "-np", "2", sys.executable, ROOT / "scripts" / script, *flags]
    subprocess.run([*map(str, command)], check=True)


if __name__ == "__main__":
    main()
