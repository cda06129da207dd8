"""PyTorch's own tests for backends: what gloo passes on the CPU, ours passes. suite/run.py counts them all."""

from pathlib import Path

import pytest

pytest.importorskip("expecttest")  # PyTorch's tests are written with it

from tests.pipeline.mpi.suite.run import outcomes

LINES = Path(__file__).with_name("suite").joinpath("passes.txt").read_text().splitlines()
PASSES = [line.split() for line in LINES if line and not line.startswith("#")]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("mask", ["gloo", "mpi"])
def test_what_passes_still_passes(mask: str) -> None:
    names = [name for where, name in PASSES if where == mask]
    done = outcomes("cpu:mpi", mask, names, timeout=280)
    others = {name: outcome for name, outcome in done.items() if outcome[0] != "pass"}
    assert not others
    assert len(done) == len(names)
