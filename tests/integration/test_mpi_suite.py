"""PyTorch's tests for backends: the MPI backend passes those in mpi_suite/passes.txt. mpi_suite/run.py runs all."""

from pathlib import Path

import pytest

pytest.importorskip("expecttest")  # PyTorch's tests import it

from tests.integration.mpi_suite.run import outcomes

LINES = Path(__file__).with_name("mpi_suite").joinpath("passes.txt").read_text().splitlines()
PASSES = [line.split() for line in LINES if line and not line.startswith("#")]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("mask", ["gloo", "mpi"])
def test_listed_tests_pass(mask: str) -> None:
    names = [name for listed_mask, name in PASSES if listed_mask == mask]
    done = outcomes("cpu:mpi", mask, names, timeout=280)
    failures = {name: outcome for name, outcome in done.items() if outcome[0] != "pass"}
    assert not failures
    assert len(done) == len(names)
