"""The layout that a run chooses: which candidates are tried, and which one is taken."""

import re
import tomllib
from dataclasses import asdict

import numpy as np
import pytest

from fira.planner.candidates import Candidate
from fira.planner.step_time import Estimate
from fira.training.auto_layout import (
    PER_LAYOUT,
    LayoutPlan,
    Trial,
    describe,
    in_order,
    is_for_memory,
    plan_of,
    shortlist_of,
)
from pipeline.mesh import Layout
from tests.fira.training.small_runs import losses, train

REPLICAS, PIPELINE, EXPERTS = Layout(1, 2, 1), Layout(2, 1, 1), Layout(1, 2, 2)
CHOSEN = re.compile(
    r"(pp (\d) × dp (\d) \(ep (\d)\)(?:, ([\w-]+))?, (?:one|\d+) micro-batch(?:es)? of (\d+)): .+ms per step"
)


def trial(layout: Layout, predicted: float, measured: float | None = None) -> Trial:
    return Trial(Candidate(layout, "1f1b", 2, 3, 0), predicted, measured)


@pytest.mark.parametrize(
    ("trials", "first"),
    [
        ([trial(REPLICAS, 2, 10), trial(EXPERTS, 1, 11)], REPLICAS),  # measurements decide
        ([trial(REPLICAS, 2, 10), trial(EXPERTS, 1)], REPLICAS),  # not a prediction next to them
        ([trial(REPLICAS, 2), trial(EXPERTS, 1)], EXPERTS),
        ([trial(REPLICAS, 2, 100), trial(PIPELINE, 1, 105)], PIPELINE),  # a pipeline that is nearly as fast
        ([trial(REPLICAS, 2, 100), trial(PIPELINE, 1, 106)], REPLICAS),
        ([trial(REPLICAS, 2, 100), trial(PIPELINE, 1)], REPLICAS),
        ([trial(REPLICAS, 2, 100), trial(EXPERTS, 1, 104)], EXPERTS),  # the prediction decides between equal ones
    ],
)
def test_order_of_trials(trials: list[Trial], first: Layout) -> None:
    assert in_order(trials)[0].candidate.layout == first
    assert sorted(in_order(trials), key=str) == sorted(trials, key=str)


def test_the_best_of_each_layout_are_tried_first() -> None:
    layouts = [REPLICAS, REPLICAS, PIPELINE, REPLICAS, REPLICAS, EXPERTS, PIPELINE]
    estimates = [
        Estimate(Candidate(layout, "1f1b", 1, 1, 0), seconds, (), {}, None) for seconds, layout in enumerate(layouts)
    ]
    assert [estimate.seconds for estimate in shortlist_of(estimates)] == [0, 2, 5, 1, 6, 3]
    assert PER_LAYOUT == 3


def test_text_of_a_plan() -> None:
    plan = LayoutPlan([trial(PIPELINE, 0.05, 0.041), trial(REPLICAS, 0.04, 0.055), trial(EXPERTS, 0.06)], considered=23)
    assert str(plan) == (
        "pp 2 × dp 1 (ep 1), 1f1b, 3 micro-batches of 2: 41 ms per step measured, best of 23 candidates; "
        "pp 1 × dp 2 (ep 1), 3 micro-batches of 2: 55 ms"
    )
    assert [line.split()[-2:] for line in plan.table().splitlines()[1:]] == [
        ["41.0", "ms"],
        ["55.0", "ms"],
        ["60.0", "ms"],
    ]


@pytest.mark.parametrize(("memory", "valid"), [(2.9e9, False), (3.1e9, True), (7.9e9, True), (8.1e9, False)])
def test_a_stored_plan_is_for_a_range_of_memory(memory: float, valid: bool) -> None:
    """Its candidates must fit, and with much more memory others may."""
    found = {"trials": [asdict(trial(REPLICAS, 2, 10))], "considered": 5, "needed": 3e9, "memory": 4e9}
    assert plan_of(found) == LayoutPlan([trial(REPLICAS, 2, 10)], 5)
    assert is_for_memory(found, memory) == valid


def test_a_description_names_what_saves_memory() -> None:
    candidate = Candidate(REPLICAS, "1f1b", 2, 1, recompute=3, shard="optimizer")
    assert describe(candidate) == "pp 1 × dp 2 (ep 1), one micro-batch of 2, --shard optimizer, --recompute 3"


def test_a_run_is_that_of_the_chosen_flags(settings, tmp_path) -> None:
    """Bitwise. The second command reads the plan of the first one."""
    flags = ["--micro-batch-size", 2, "--steps", 3]
    first, second, given = (tmp_path / name for name in ("first", "second", "given"))
    output = train(settings, 2, "--plan", "auto", *flags, "--out", first).stdout
    found = CHOSEN.search(output)
    assert found
    layout = [
        word for flag, size in zip(("--pp", "--dp", "--ep"), found.groups()[1:4], strict=True) for word in (flag, size)
    ]
    assert int(found[2]) * int(found[3]) == 2
    assert found[6] == "2"
    assert found[1] in train(settings, 2, "--plan", "auto", *flags, "--out", second).stdout
    train(settings, 2, *layout, "--schedule", found[5] or "1f1b", *flags, "--out", given)
    np.testing.assert_array_equal(losses(first), losses(second))
    np.testing.assert_array_equal(losses(first), losses(given))


def test_given_flags_are_kept(settings, tmp_path) -> None:
    result = train(settings, 2, "--plan", "explain", "--pp", 2, "--out", tmp_path / "run")
    *candidates, empty, chosen = result.stdout.splitlines()[2:]  # after the announcement and the header
    assert chosen.startswith("chosen: pp 2 × dp 1 (ep 1), ")
    assert not empty
    assert candidates
    assert all(line.startswith("pp 2 × dp 1 (ep 1), ") for line in candidates)
    assert not (tmp_path / "run").exists()


def test_nothing_is_measured_without_a_choice(settings) -> None:
    result = train(settings, 2, "--plan", "explain", "--pp", 2, "--schedule", "gpipe")  # the micro-batch size is given
    _, line = result.stdout.splitlines()
    assert line == "chosen: pp 2 × dp 1 (ep 1), gpipe, 3 micro-batches of 2, without a measurement"


def test_config_of_the_run_has_the_given_flags_only(settings, tmp_path) -> None:
    """So that it can be used for another number of ranks."""
    train(settings, 2, "--plan", "auto", "--steps", 1, "--out", tmp_path / "run")
    assert not {"pp", "dp", "ep", "schedule"} & tomllib.loads((tmp_path / "run" / "config.toml").read_text()).keys()


def test_flags_that_no_layout_satisfies_are_an_error(settings) -> None:
    result = train(settings, 2, "--plan", "explain", "--pp", 1, "--dp", 1, status=2)
    assert len(result.stderr.splitlines()) == 1
