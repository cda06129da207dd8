"""Estimates of memory and measurements of training steps."""

from benchmarks.memory.accuracy_ranks import Case, measured, predicted
from fira.planner.candidates import Candidate
from pipeline.mesh import Layout

SMALL = {"seq_len": 32, "num_layers": 3}
CASES = [
    Case("fira-tiny", Candidate(Layout(1, 2, 2), "1f1b", 4, 1, 0), SMALL, "muon"),
    Case("mooshak-tiny", Candidate(Layout(1, 2, 1), "1f1b", 4, 2, 1, "optimizer"), SMALL),
    Case("rish-tiny", Candidate(Layout(2, 1, 1), "zb-h1", 4, 4, 0), SMALL),
    Case("blues-tiny", Candidate(Layout(1, 2, 1), "1f1b", 4, 4, 0, "parameters"), SMALL),
]


def estimates() -> list[tuple[str, float, float]]:
    """Each case with the estimated and the measured bytes of the rank with the most."""
    return [(str(case), predicted(case), measured(case)) for case in CASES]
