"""Means, standard errors, the table and evaluation.json."""

import json
import math
import statistics
from pathlib import Path

import pytest

from fira.evaluation.task_scores import Score, TaskScores, mean_score, perplexity_score, summarise, table, write_scores


def test_standard_error_is_that_of_lm_eval() -> None:
    ones = [1.0] * 7 + [0.0] * 13
    score = mean_score(ones)
    assert score.value == 0.35
    assert score.error == pytest.approx(math.sqrt(0.35 * 0.65 / 19))
    assert score.error == pytest.approx(statistics.stdev(ones) / math.sqrt(20))
    assert mean_score([1.0]) == Score(1.0, None)


def test_perplexity_is_that_of_the_mean_log_probability() -> None:
    logs = [-1.0, -3.0, -2.0]
    score = perplexity_score(logs)
    assert score.value == pytest.approx(math.exp(2))
    assert score.error == pytest.approx(math.exp(2) * statistics.stdev(logs) / math.sqrt(3))
    assert math.isfinite(perplexity_score([-2000.0, -2001.0]).value)


def test_each_metric_is_summarised() -> None:
    scores = summarise([{"acc": 1.0, "perplexity": -1.0}, {"acc": 0.0, "perplexity": -1.0}])
    assert scores == {"acc": Score(0.5, 0.5), "perplexity": Score(math.e, 0.0)}


RESULTS = [
    TaskScores("words", 1200, {"acc": Score(0.25, 0.0125), "perplexity": Score(3e7, None)}, truncated=3, chance=0.0),
    TaskScores("hellaswag", 9, {"acc": Score(0.5, None)}),
]


def test_table() -> None:
    lines = table(RESULTS).splitlines()
    assert [line.split() for line in lines] == [
        ["task", "metric", "score", "error", "chance", "examples", "truncated"],
        ["words", "acc", "0.2500", "0.0125", "0.0000", "1,200", "3"],
        ["perplexity", "3.0000e+07", "1,200", "3"],
        ["hellaswag", "acc", "0.5000", "9", "0"],
    ]
    assert len({len(line) for line in lines}) == 1


def test_document(tmp_path: Path) -> None:
    write_scores(tmp_path / "evaluation.json", "runs/a", RESULTS)
    document = json.loads((tmp_path / "evaluation.json").read_text())
    assert document["model"] == "runs/a"
    assert document["tasks"]["words"] == {
        "examples": 1200,
        "scores": {"acc": {"value": 0.25, "error": 0.0125}, "perplexity": {"value": 3e7, "error": None}},
        "truncated": 3,
        "chance": 0.0,
    }
