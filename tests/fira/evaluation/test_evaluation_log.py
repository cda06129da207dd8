"""Rows of evaluation.csv after a resume."""

from pathlib import Path

import pandas as pd
import pytest

from fira.errors import UserError
from fira.evaluation.evaluation_log import EvaluationLog
from fira.evaluation.task_scores import Score, TaskScores


def scores(value: float) -> list[TaskScores]:
    return [TaskScores('a,"b"', 9, {"acc": Score(value, 0.1), "perplexity": Score(7.0, None)})]


def test_rows_of_repeated_steps_are_replaced(tmp_path: Path) -> None:
    log = EvaluationLog(tmp_path / "evaluation.csv")
    log.keep(0)
    assert not log.path.exists()
    for step in (5, 10, 15):
        log.write(step, scores(step / 100))
    log.keep(10)
    log.write(10, scores(0.5))
    rows = pd.read_csv(log.path)
    assert rows["iter"].tolist() == [5, 5, 10, 10]
    assert rows["task"].unique().tolist() == ['a,"b"']
    assert rows["metric"].tolist() == ["acc", "perplexity"] * 2
    assert rows["score"].tolist() == [0.05, 7, 0.5, 7]
    assert rows["error"].isna().tolist() == [False, True] * 2


@pytest.mark.parametrize(
    "content", [b"iter,loss\n1,2\n", b"iter,task,metric,score,error\nx,a,b,1,\n", b"\xff\xff\n", b""]
)
def test_other_files_are_not_overwritten(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "evaluation.csv"
    path.write_bytes(content)
    with pytest.raises(UserError, match="not a log of evaluations"):
        EvaluationLog(path).write(3, scores(0.5))
    assert path.read_bytes() == content
