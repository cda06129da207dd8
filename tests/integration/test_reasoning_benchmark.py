"""The reasoning benchmark in a tiny setting, and its problems."""

import json
import math
from pathlib import Path

import pandas as pd
import pytest

from benchmarks.reasoning.problems import KINDS, TEST, TRAINING, part_of, problems
from benchmarks.reasoning.run import MARKER, STEPS, Setting, run
from benchmarks.reasoning.summary import ALL, draw, summarise
from fira.posttraining.exact_answer import final_answer

TINY = Setting(
    teacher_problems=200,
    student_problems=100,
    tests=1,
    common="--seq-len 192 --threads 1 --eval-sequences 4 --steps 2 --warmup 1 --batch-size 8",
    teacher="--model mooshak-tiny",
    teacher_model="d_model=16,n_head=2,n_kv_head=2,num_layers=1,d_ff=8",
    student="--model mooshak-tiny",
    student_model="d_model=8,n_head=2,n_kv_head=2,num_layers=1,d_ff=8",
    third_stage="",
)


def test_problems_of_training_and_test_are_disjoint_and_solved() -> None:
    training, test = problems(400, STEPS, 1, TRAINING), problems(400, STEPS, 2, TEST)
    assert not {problem.question for problem in training} & {problem.question for problem in test}
    assert {part_of(problem) for problem in training} == {TRAINING}
    assert {part_of(problem) for problem in test} == {TEST}
    for problem in training + test:
        assert final_answer(problem.completion, MARKER) == problem.answer == _solved(problem.kind, problem.question)
    assert {(problem.kind, problem.steps) for problem in test} == {(k.__name__, n) for k in KINDS for n in STEPS}


def test_share_of_wrong_steps() -> None:
    """Additions: each wrong result is one off, and the following steps continue from it."""
    wrong = steps = 0
    for problem in problems(2000, (2, 3), 1, TRAINING, errors=0.2):
        if problem.kind == "addition":
            *lines, final = *problem.solution.split(), problem.written
            results = [int(line.partition("=")[2]) for line in lines]
            sums = [eval(line.partition("=")[0]) for line in lines]
            assert {abs(a - b) for a, b in zip(results, sums, strict=True)} <= {0, 1}
            assert int(final) == sum(r % 10 * 10**i for i, r in enumerate(results)) + results[-1] // 10 * 10 ** len(
                results
            )
            wrong += sum(a != b for a, b in zip(results, sums, strict=True))
            steps += len(results)
    assert wrong / steps == pytest.approx(0.2, abs=0.04)


def _solved(kind: str, question: str) -> str:
    """The answer from the question alone."""
    if kind in ("addition", "boolean"):
        value = eval(question.removesuffix(" = ?"))
        return str(value).lower()
    *facts, asked = question.split(". ")
    if kind == "comparison":
        ages = {name: int(age) for name, _, age in map(str.split, facts)}
        return max(ages, key=ages.__getitem__)
    thing, who = asked.split()[2], asked.split()[4].removesuffix("?")
    total = 0
    for name, verb, *rest in map(str.split, facts):
        if name == who and rest[-1] == thing:
            total += int(rest[-2]) * (-1 if verb in ("loses", "sells", "gives") else 1)
    return str(total)


def test_intervals_are_those_of_paired_seeds(tmp_path: Path) -> None:
    rows = [
        {"method": method, "seed": seed, "kind": "words", "steps": 2, "exact_match": value}
        for method, values in {"teacher": (1.0,), "alone": (0.1, 0.5, 0.3), "distilled": (0.2, 0.6, 0.5)}.items()
        for seed, value in enumerate(values)
    ]
    summary = summarise(pd.DataFrame(rows))
    found = summary[(summary["method"] == "distilled") & (summary["steps"] == ALL)].iloc[-1]
    assert found["difference"] == pytest.approx(0.4 / 3)
    assert found["difference_ci95"] == pytest.approx(4.303 * math.sqrt(1 / 300) / math.sqrt(3), rel=1e-3)
    draw(summary, tmp_path / "a.png")


@pytest.mark.slow
def test_runner_skips_finished_runs(tmp_path: Path) -> None:
    seeds = {"distilled": 1, "distilled + GRPO": 1}
    scores = run(tmp_path, TINY, seeds)
    assert list(scores["method"].unique()) == ["teacher", *seeds]
    assert len(scores) == 3 * len(KINDS) * len(STEPS)
    assert scores["exact_match"].between(0, 1).all()
    example = json.loads((tmp_path / "tasks" / "words-3.jsonl").read_text())
    assert example["answer"] == _solved("words", example["prompt"][0]["content"])
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/training_log.csv")}
    assert len(times) == 3
    assert run(tmp_path, TINY, seeds).equals(scores)
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/training_log.csv")}
