"""Files of examples: names, limits, and errors that name file and line."""

import re
from pathlib import Path

import pytest

from fira.errors import UserError
from fira.evaluation.task_files import read_tasks
from tests.fira.evaluation.evaluation_examples import CHOICES, PAIRS, write_jsonl, write_tasks


def test_tasks_have_the_names_of_their_files_and_all_examples(tmp_path: Path) -> None:
    tasks = read_tasks(write_tasks(tmp_path))
    assert [(task.name, len(task.examples)) for task in tasks] == [("choices", 23), ("pairs", 9), ("words", 16)]
    assert tasks[1].examples[2].where == f"{tmp_path}/pairs.jsonl, line 3"
    limited = read_tasks(write_tasks(tmp_path), limit=4)
    assert [task.examples for task in limited] == [task.examples[:4] for task in tasks]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "a.jsonl: contains no example"),
        ("\n \n", "a.jsonl: contains no example"),
        ('{"text": "a b"}\n{"text"', "a.jsonl, line 2: invalid JSON"),
        ('{"text": "a b"}\n\n["a"]\n', "a.jsonl, line 3: not a JSON object"),
        ('{"text": "a b"}\n{"txt": "a b"}\n', "a.jsonl, line 2: has 'txt'; give the fields of one form"),
        (
            '{"text": "a b"}\n{"sentence_good": "a", "sentence_bad": "b"}\n',
            "a.jsonl, line 2: has another form than line 1, text;",
        ),
    ],
)
def test_errors_name_file_and_line(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(UserError, match=re.escape(f"{tmp_path}/{message}")) as error:
        read_tasks([str(tmp_path / "a.jsonl")])
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path, message in (("nowhere.jsonl", "No such file"), (".", "not a file of examples"), ("a.csv", "not a file")):
        with pytest.raises(UserError, match=message):
            read_tasks([str(tmp_path / path)])


def test_two_tasks_with_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    paths = [write_jsonl(tmp_path / "a.jsonl", CHOICES), write_jsonl(tmp_path / "other" / "a.jsonl", PAIRS)]
    with pytest.raises(UserError, match="two tasks are named a;"):
        read_tasks([str(path) for path in paths])
