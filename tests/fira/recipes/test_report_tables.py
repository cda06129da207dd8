"""Tables of the report: best values, shares, and texts from data and models as text, never as HTML."""

import json
from pathlib import Path

import pytest

from fira.evaluation.task_scores import GeneratedAnswer, Score, TaskScores, write_scores
from fira.recipes.recipe_file import Recipe, Stage
from fira.recipes.report_tables import answers, evaluations, scores

ASKED = [{"role": "user", "content": "1 < 2?"}]


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """Two evaluations: of the first model on two tasks and a text, of the second on one task."""
    stages = [Stage(name, "evaluate", f"<{name}>", None, {}) for name in ("a", "b", "absent")]
    results = {
        "a": [
            TaskScores("t", 4, {"acc": Score(0.25, 0.1)}, chance=0.25),
            TaskScores("u", 1, {"exact_match": Score(1, None)}, answers=(GeneratedAnswer(ASKED, "<b>", " <b>", True),)),
        ],
        "b": [TaskScores("t", 4, {"acc": Score(0.5, 0.1)}, chance=0.25)],
    }
    for name, entries in results.items():
        (tmp_path / name).mkdir()
        texts = {"x/y.txt": {"loss": 2.0, "bits_per_byte": 1.25, "tokens": 1000}} if name == "a" else None
        write_scores(tmp_path / name / "evaluation.json", name, entries, texts)
    return Recipe(tmp_path / "r.toml", "title", tmp_path, stages)


def test_rows_of_scores(recipe):
    table = scores(evaluations(recipe))
    assert "<th>&lt;a&gt;</th><th>&lt;b&gt;</th>" in table
    assert "<td>t · acc</td><td>25.0%</td><td><b>50.0%</b></td><td>4, chance 25%</td>" in table
    assert "<td>u · exact_match</td><td>100.0%</td><td></td>" in table
    assert "<td>y · bits per byte</td><td>1.250</td><td></td><td>1,000 tokens</td>" in table


def test_answers_are_marked_and_escaped(recipe):
    found = evaluations(recipe)
    assert '<td>1 &lt; 2?</td><td>&lt;b&gt;</td><td><span class="right">&lt;b&gt;</span></td>' in answers(found)
    found[0].tasks["u"]["answers"][0] |= {"generated": "  ", "right": False}
    assert '<span class="wrong">(empty)</span>' in answers(found)


def test_losses_and_answers_are_in_evaluation_json(recipe):
    document = json.loads((recipe.out / "a" / "evaluation.json").read_text())
    assert document["texts"]["x/y.txt"]["loss"] == 2.0
    assert document["tasks"]["u"]["answers"] == [{"prompt": ASKED, "answer": "<b>", "generated": " <b>", "right": True}]
    assert "answers" not in document["tasks"]["t"]


def test_texts_and_questions_of_the_same_name_are_kept_apart(recipe):
    found = evaluations(recipe)
    found[1].texts["z/y.txt"] = {"bits_per_byte": 3.5, "tokens": 10}
    other = {"prompt": "2 < 1?", "answer": "no", "generated": "no", "right": True}
    found[1].tasks["u"] = found[0].tasks["u"] | {"answers": [other]}
    table = scores(found)
    assert table.index("x/y.txt · bits per byte") < table.index("z/y.txt · bits per byte")
    assert answers(found).count("<table") == 2
