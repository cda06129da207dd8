"""Some of the injected faults of `python -m tests.chaos`, which runs all of them and writes the fault table."""

import pytest

from tests.chaos.__main__ import run
from tests.chaos.cases import CASES

QUICK = [
    "killed-training-2",
    "os_exit_0-saving-2",
    "sys_exit_3-start-2",
    "other_order-training-2",
    "wrong_data-training-2",
    "long-preparation-2",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_fault_ends_the_job_with_a_message(name: str):
    (case,) = [case for case in CASES if case.name == name]
    outcome = run(case)
    assert not outcome.problems, outcome.error


def test_every_case_has_a_name_of_its_own():
    assert len({case.name for case in CASES}) == len(CASES) >= 50
