"""Questions about Python's functions: right answers, held-out functions, and the same files each time."""

import importlib
import inspect
import json
from pathlib import Path

import pytest

from fira.data.python_functions import Function, public_functions, summary
from fira.data.python_questions import chosen, listed, write_questions
from fira.data.sources import input_files

MODULES = (
    *(
        "shutil.py",
        "posixpath.py",
        "textwrap.py",
        "base64.py",
        "statistics.py",
        "fnmatch.py",
        "difflib.py",
        "random.py",
    ),
    "urllib/parse.py",
)


@pytest.fixture(scope="module")
def files() -> list[Path]:
    return [path for path in input_files(None) if path.as_posix().endswith(tuple(f"/{name}" for name in MODULES))]


@pytest.fixture(scope="module")
def functions(files: list[Path]) -> dict[str, Function]:
    return {function.name: function for function in public_functions(files)}


@pytest.fixture(scope="module")
def folder(files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("questions")
    write_questions(folder, files)
    return folder


def records(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_names_parameters_and_summaries_are_those_of_the_interpreter(functions):
    assert len(functions) > 300
    for name, function in functions.items():
        module, _, attribute = name.rpartition(".")
        if not function.module or function.parameters is None:
            continue
        value = getattr(importlib.import_module(module), attribute)
        assert list(function.names) == list(inspect.signature(value).parameters), name
        text = " ".join((inspect.getdoc(value) or "").split())
        assert function.summary.rstrip(".") in text, name


def test_known_functions(functions):
    assert functions["os.path.join"].parameters == "a, *p"
    assert functions["math.sqrt"].summary == "Return the square root of x."
    assert functions["len"].module == ""
    assert functions["time.sleep"].summary == "Delay execution for a given number of seconds."
    assert "str.split" in functions


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("Return the\n    sum of all. More.\n\nEven more.", "Return the sum of all."),
        ("return what is not a sentence here", None),
        ("Short.", None),
        ("Returns the system's release, e.g. '2.2.0'", None),
        ("", None),
    ],
)
def test_summary_is_the_first_sentence(docstring, sentence):
    assert summary(docstring) == sentence


def test_listed():
    assert listed([]) == "It has no parameters."
    assert listed(["a"]) == "`a`."
    assert listed(["a", "b", "c"]) == "`a`, `b` and `c`."


def test_no_chat_and_no_preference_mentions_a_held_out_function(folder, functions):
    held_out = {name for name in functions if chosen(name, 0.1)}
    assert 0.05 < len(held_out) / len(functions) < 0.15
    text = (folder / "chats.jsonl").read_text() + (folder / "preferences.jsonl").read_text()
    assert not [name for name in held_out if f"`{name}`" in text or f"`{name}(" in text]
    asked = [record["query"][0]["content"] for record in records(folder, "held_out_choice")]
    assert {question.split("`")[1] for question in asked} == held_out


def test_tasks_ask_what_the_chats_contain(folder):
    chats = {tuple(message["content"] for message in chat["messages"]) for chat in records(folder, "chats")}
    for name in ("purpose", "parameters", "search"):
        for record in records(folder, f"seen_{name}"):
            assert (record["prompt"][0]["content"], record["answer"]) in chats
    for record in records(folder, "held_out_import") + records(folder, "held_out_listing"):
        assert (record["prompt"][0]["content"], record["answer"]) not in chats


def test_a_right_choice_is_at_every_place_and_right(folder, functions):
    choices = records(folder, "held_out_choice")
    assert {record["answer"] for record in choices} == {0, 1, 2, 3}
    for record in choices:
        name = record["query"][0]["content"].split("`")[1]
        assert record["choices"][record["answer"]] == functions[name].summary
        assert len(set(record["choices"])) == 4


def test_the_preferred_answer_is_the_one_of_the_chats(folder):
    chats = {chat["messages"][0]["content"]: chat["messages"][1]["content"] for chat in records(folder, "chats")}
    preferences = records(folder, "preferences")
    assert all(chats[record["prompt"]] == record["chosen"] != record["rejected"] for record in preferences)


def test_the_same_installation_yields_the_same_files(folder, files, tmp_path):
    write_questions(tmp_path, files)
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in tmp_path.iterdir())
    assert all((folder / name).read_bytes() == (tmp_path / name).read_bytes() for name in names)
