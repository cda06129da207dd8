"""Evaluation in training: the numbers of evaluate.py, the same on every layout, also after a resume; invalid tasks."""

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from fira import load_model
from fira.checkpoint.load_model import own_config
from fira.evaluation.local_model import LocalModel
from fira.evaluation.request_encoding import RequestEncoder
from fira.evaluation.task_evaluation import encode_task
from fira.evaluation.task_files import read_tasks
from fira.evaluation.task_forms import ExactAnswer
from tests.fira.evaluation.evaluation_examples import WORDS, write_jsonl, write_tasks
from tests.fira.training.small_runs import TRAIN, cache, errors, train
from tests.launch import run_ranks

pytestmark = pytest.mark.slow

# Large weights, so that answers differ. Micro-batches of 2 sequences on every layout.
FLAGS = ["--seq-len", 64, "--steps", 4, "--eval-every", 4, "--save-every", 2, "--lr", 0.3, "--warmup", 0]
LAYOUTS = {2: [["--pp", 2], ["--dp", 2], ["--dp", 2, "--ep", 2]]}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def evaluated(settings: Path, tasks: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on one rank, evaluated after steps 2 and 4."""
    out = tmp_path_factory.mktemp("evaluated") / "run"
    result = train(settings, 1, *FLAGS, "--eval-tasks", ",".join(tasks), "--eval-tasks-every", 2, "--out", out)
    assert result.stdout.count("perplexity") == 2
    return out


def test_scores_are_those_of_evaluate(evaluated: Path, tasks: list[str]) -> None:
    document = json.loads((evaluated / "evaluation.json").read_text())
    log = pd.read_csv(evaluated / "evaluation.csv")
    for step in (2, 4):
        model = load_model(evaluated / "checkpoints" / f"step-{step:06d}")
        encoder = RequestEncoder(model.tokenizer, own_config(model), 64)
        for task in read_tasks(tasks):
            scores = encode_task(task, encoder).scores(LocalModel(model, 2))
            rows = log[(log["iter"] == step) & (log["task"] == task.name)]
            assert dict(zip(rows["metric"], rows["score"], strict=True)) == pytest.approx(
                {metric: score.value for metric, score in scores.scores.items()}, rel=1e-8
            )
            if step == 4:
                assert document["tasks"][task.name]["truncated"] == scores.truncated
                found = document["tasks"][task.name]["scores"]
                assert found == {metric: score._asdict() for metric, score in scores.scores.items()}


@pytest.fixture(scope="module")
def answers(evaluated: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task with generated answers. Three of four are what the model generates after the last step."""
    model = load_model(evaluated)
    encoder = RequestEncoder(model.tokenizer, own_config(model), 64)
    examples = [ExactAnswer(" ".join(WORDS[n % 7 : n % 11 + 1]) or "def", "", (";",), 9 + n % 2) for n in range(30)]
    generated = LocalModel(model, 1).answers([encoder.prompt(example, "x") for example in examples])
    pairs = [(example, answer) for example, answer in zip(examples, generated, strict=True) if answer.strip()][:16]
    assert len({answer for _, answer in pairs}) > 3
    records = [
        {
            "prompt": example.prompt,
            "answer": "not " * (number % 4 == 0) + answer,
            "stop": ";",
            "max_tokens": example.max_tokens,
        }
        for number, (example, answer) in enumerate(pairs)
    ]
    assert len(records) == 16
    return write_jsonl(tmp_path_factory.mktemp("answers") / "answers.jsonl", records)


@pytest.mark.parametrize("layout", LAYOUTS[2], ids=lambda flags: "".join(map(str, flags)))
def test_scores_do_not_depend_on_the_layout(
    settings: Path, evaluated: Path, tasks: list[str], answers: Path, tmp_path: Path, layout: list[Any]
) -> None:
    """The perplexity has all bits of its log-probabilities in evaluation.json."""
    flags = ["--eval-tasks", ",".join([*tasks, str(answers)]), "--eval-tasks-every", 2]
    train(settings, 2, *FLAGS, *flags, *layout, "--out", tmp_path / "run")
    runs = tmp_path / "run", evaluated
    found, expected = (json.loads((run / "evaluation.json").read_text())["tasks"] for run in runs)
    assert found.pop("answers")["scores"]["exact_match"]["value"] == 0.75
    assert found == expected
    logs = [(run / "evaluation.csv").read_text().splitlines() for run in runs]
    assert [row for row in logs[0] if ",answers," not in row] == logs[1]


def test_resumed_run_repeats_the_evaluation(settings: Path, evaluated: Path, tmp_path: Path) -> None:
    """With the tasks in the run's config.toml, on another layout."""
    run = shutil.copytree(evaluated, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "step-000004")
    with (run / "evaluation.csv").open("a") as file:
        file.write("7,of a later step,acc,1,\n")
    result = run_ranks(2, TRAIN, "--pp", 2, "--out", run, "--resume", "auto", timeout=100, env=cache(settings))
    assert "resumed after step 2" in result.stdout, result.stderr
    assert (run / "evaluation.csv").read_bytes() == (evaluated / "evaluation.csv").read_bytes()


def test_invalid_tasks_end_all_ranks_before_training(settings: Path, tmp_path: Path) -> None:
    question = {"query": "a", "choices": ["b", "c"], "answer": 0}
    long = write_jsonl(tmp_path / "long.jsonl", [question, {"query": "a", "choices": ["b", "c " * 99], "answer": 1}])
    cases = {
        "line 2: a continuation of": [*FLAGS, "--eval-tasks", long, "--out", tmp_path / "run"],
        "nowhere.jsonl: No such file": [*FLAGS, "--eval-tasks", "nowhere.jsonl", "--out", tmp_path / "run"],
    }
    for expected, message in zip(cases, errors(settings, 2, list(cases.values())), strict=True):
        assert expected in message

    invalid = write_jsonl(tmp_path / "invalid.jsonl", [question, question | {"answer": 2}])
    result = train(settings, 2, *FLAGS, "--eval-tasks", invalid, "--out", tmp_path / "run", status=2)
    (line,) = filter(None, result.stderr.splitlines())
    assert "invalid.jsonl, line 2: answer is 2, not the number" in line
    assert not (tmp_path / "run" / "training_log.csv").exists()
