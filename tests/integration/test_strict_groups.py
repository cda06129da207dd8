"""Training under NCCL's rules for communicators is bitwise identical to training with the ordinary backend.

`tests/ranks/strict_group.py` states the rules. All cases of one number of ranks run in one job.
"""

import functools
from typing import Any

import pytest

from fira.models.blues import BluesConfig
from fira.models.registry import to_document
from pipeline.schedule import SCHEDULES
from tests.launch import run_function

TIED = BluesConfig(vocab_size=61, seq_len=13, num_layers=4, d_ff=20, d_model=24, n_head=6, n_kv_head=2, dropout=0.0)
SETTINGS: dict[str, Any] = {"dropout": 0.1, "steps": 2, "layers": 6, "observe": True, "reduction": "overlapped"}
CASES = [
    {"layout": layout, "schedule": schedule, **SETTINGS}
    for layout in ([2, 1, 1], [4, 1, 1], [2, 2, 2])
    for schedule in SCHEDULES
]
CASES += [{"layout": [1, 2, ep], "schedule": schedule, **SETTINGS} for ep, schedule in ((1, "1f1b"), (2, "zb-v"))]
CASES += [{"layout": [pp, 2, 2], "schedule": "zb-h1", "parts": 2, **SETTINGS} for pp in (1, 2)]
CASES += [{"layout": [2, 1, 1], "schedule": "zb-h1", "model": to_document(TIED), **SETTINGS}]

pytestmark = pytest.mark.timeout(420)  # the first test of a number of ranks waits for all their cases


def ranks_of(case: dict[str, Any]) -> int:
    return case["layout"][0] * case["layout"][1]


@functools.cache
def results(ranks: int) -> list[Any]:
    """[rank][ordinary, strict][case]"""
    cases = [case for case in CASES if ranks_of(case) == ranks]
    return run_function(ranks, "tests.ranks.strict_ranks", "train_both", timeout=400, cases=cases)


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[pytest.mark.slow] * (ranks_of(case) > 2)) for case in CASES],
    ids=lambda case: f"{case['schedule']}-{case['layout']}{'-tied' * ('model' in case)}",
)
def test_training_evaluation_and_trace(case):
    place = [c for c in CASES if ranks_of(c) == ranks_of(case)].index(case)
    for ordinary, strict in results(ranks_of(case)):
        assert strict[place] == ordinary[place]
        assert len(strict[place]["validation"]) == 2
        assert min(strict[place]["traced"]) > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("train_unconnected", "to the creation of a communicator"),
        ("train_on_one_communicator", "not executed: recv with rank"),
    ],
)
def test_designs_that_break_the_rules_are_ended(function, message):
    with pytest.raises(AssertionError, match="deadlock under NCCL's rules after 5 s") as failure:
        run_function(2, "tests.ranks.strict_ranks", function, env={"STRICT_GROUP_LIMIT_S": "5"})
    assert message in str(failure.value)
