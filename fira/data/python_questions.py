"""Texts, chats, preferences and test questions about the functions of the installed Python.

    source.jsonl, documentation.jsonl   texts: the standard library, and its docstrings with names and parameters
    text_test.jsonl                     a part of the source of modules that source.jsonl does not contain
    chats.jsonl                         questions of all KINDS about the functions that are not held out
    preferences.jsonl                   the right answer, and a wrong, a broken off or an empty one
    seen_*.jsonl                        tasks: questions as they occur in chats.jsonl
    held_out_*.jsonl                    tasks: questions about functions that neither chats nor preferences mention

A tenth of the functions, chosen by a hash of the name, is held out. What a function does cannot be known from its name
alone, but may be from the source; `held_out_choice` asks for the right one of four sentences. The answers to
`held_out_import` and `held_out_listing` follow from the question. The same installation always yields the same files.
"""

import ast
import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from fira.data.python_functions import Function, module_name, public_functions
from fira.files import errors_naming, replace

HELD_OUT, TEST_TEXT = 0.1, 0.03  # shares of the functions, and of the modules
TEST_CHARACTERS, PART = 40_000, 2_000  # of text_test.jsonl, and of each document in it
QUESTIONS, CHOICES = 60, 4  # of a task, and of a question
MAX_TOKENS = 64  # of an answer
EMPTY = ("I do not know.", "It does something.", "It is a function.")
Record = dict[str, Any]
T = TypeVar("T")


class Kind(NamedTuple):
    """Questions with the fields of Function in braces, and the function of its answer; None: it is not asked."""

    questions: tuple[str, ...]
    answer: Callable[[Function], str | None]


def listed(names: Sequence[str]) -> str:
    """Names as a sentence: "`a`, `b` and `c`."."""
    if not names:
        return "It has no parameters."
    quoted = [f"`{name}`" for name in names]
    return ", ".join(quoted[:-1]) + (" and " if quoted[1:] else "") + quoted[-1] + "."


def _parameters(function: Function) -> str | None:
    return listed(function.names) if function.parameters is not None else None


def _listing(function: Function) -> str | None:
    return listed(function.names) if function.parameters and len(function.parameters) <= 60 else None


def _import(function: Function) -> str:
    name = function.name.rpartition(".")[2]
    return f"`from {function.module} import {name}`" if function.module else "It is built in."


def _module(function: Function) -> str:
    return f"`{function.module}`." if function.module else "It is built in."


KINDS = {
    "purpose": Kind(
        ("What does `{name}` do?", "What is `{name}` for?", "Explain `{name}`."), lambda function: function.summary
    ),
    "parameters": Kind(("What are the parameters of `{name}`?", "Which arguments does `{name}` take?"), _parameters),
    "search": Kind(("Which function is this? {summary}",), lambda function: f"`{function.name}`."),
    "import": Kind(("How do I import `{name}`?",), _import),
    "module": Kind(("Which module contains `{name}`?",), _module),
    "listing": Kind(("Name the parameters of `{name}({parameters})`.",), _listing),
}
SECOND_TURN = "And which parameters does it have?"
PREFERRED = ("purpose", "parameters", "search")  # kinds of preferences


def write_questions(folder: Path, files: Sequence[Path]) -> dict[str, int]:
    """Write all files to a folder, and return their numbers of records. files: of the standard library.

    Raises UserError if a file cannot be written.
    """
    with errors_naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
    functions = public_functions(files)
    trained = [function for function in functions if not chosen(function.name, HELD_OUT)]
    held_out = [function for function in functions if chosen(function.name, HELD_OUT)]
    modules = {path: chosen(module_name(path), TEST_TEXT) for path in files}
    records: dict[str, Iterable[Record]] = {
        "source": texts(read(path) for path in files if not modules[path]),
        "documentation": texts(document for path in files if not modules[path] for document in documents(path)),
        "text_test": texts(test_parts([path for path in files if modules[path]])),
        "chats": shuffled(chats(trained)),
        "preferences": shuffled(preferences(trained)),
        "held_out_choice": choices(held_out),
    }
    for name in ("purpose", "parameters", "search"):
        records[f"seen_{name}"] = task(trained, name)
    for name in ("purpose", "import", "listing"):
        records[f"held_out_{name}"] = task(held_out, name)
    return {name: write(folder / f"{name}.jsonl", entries) for name, entries in records.items()}


def chosen(name: str, share: float) -> bool:
    """Whether the hash of a name is among the smallest."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") < share * 2**32


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def texts(documents: Iterable[str]) -> Iterator[Record]:
    return ({"text": text} for text in documents if text.strip())


def documents(path: Path) -> Iterator[str]:
    """Yield the name, the parameters and the docstring of each public function, class and method in a file."""

    def entries(node: ast.AST, prefix: str) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                name, text = f"{prefix}.{child.name}", ast.get_docstring(child)
                if text and not child.name.startswith("_"):
                    parameters = "" if isinstance(child, ast.ClassDef) else f"({ast.unparse(child.args)})"
                    yield f"{name}{parameters}\n\n{text}\n"
                if isinstance(child, ast.ClassDef):
                    yield from entries(child, name)

    yield from entries(ast.parse(read(path)), module_name(path))


def test_parts(files: Sequence[Path]) -> Iterator[str]:
    """Yield the first characters of each file until TEST_CHARACTERS are reached."""
    left = TEST_CHARACTERS
    for path in files:
        part = read(path)[: min(PART, left)]
        left -= len(part)
        yield part


def answered(function: Function, name: str) -> Iterator[tuple[str, str]]:
    """Yield the questions of a kind about a function, each with its answer."""
    kind = KINDS[name]
    if (answer := kind.answer(function)) is not None:
        yield from ((question.format(**function._asdict()), answer) for question in kind.questions)


def chats(functions: Sequence[Function]) -> Iterator[Record]:
    """Yield a chat for each question, and for each function one with two turns."""
    for function in functions:
        for name in KINDS:
            yield from (messages((question, answer)) for question, answer in answered(function, name))
        if parameters := _parameters(function):
            question, answer = next(answered(function, "purpose"))
            yield messages((question, answer), (SECOND_TURN, parameters))


def messages(*turns: tuple[str, str]) -> Record:
    roles = ("user", "assistant")
    pairs = ((role, content) for turn in turns for role, content in zip(roles, turn, strict=True))
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


def preferences(functions: Sequence[Function]) -> Iterator[Record]:
    """Yield pairs of the right answer and one that is wrong, broken off, or empty, by turns."""
    chooser = random.Random(1)
    for function in functions:
        for name in PREFERRED:
            for question, answer in [*answered(function, name)][:1]:
                others = (KINDS[name].answer(chooser.choice(functions)) for _ in functions)
                wrong = next(other for other in others if other not in (None, answer))
                half = answer[: max(1, len(answer) // 2)].rstrip()
                rejected = chooser.choice([wrong, wrong, half, chooser.choice(EMPTY)])
                yield {"prompt": question, "chosen": answer, "rejected": rejected}


def choices(functions: Sequence[Function]) -> Iterator[Record]:
    """Yield questions of multiple choice: what a function does, with sentences about others as wrong choices."""
    chooser = random.Random(2)
    for function in functions:
        question, answer = next(answered(function, "purpose"))
        wrong = chooser.sample([other.summary for other in functions if other is not function], CHOICES - 1)
        place = chooser.randrange(CHOICES)
        yield {"query": asked(question), "choices": [*wrong[:place], answer, *wrong[place:]], "answer": place}


def task(functions: Sequence[Function], name: str) -> Iterator[Record]:
    """Yield the first question of a kind about QUESTIONS of the functions, whose answers are compared exactly."""
    questions = [question for function in functions for question in [*answered(function, name)][:1]]
    for question, answer in shuffled(questions)[:QUESTIONS]:
        yield {"prompt": asked(question), "answer": answer, "max_tokens": MAX_TOKENS}


def asked(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def shuffled(entries: Iterable[T]) -> list[T]:
    found = [*entries]
    random.Random(0).shuffle(found)
    return found


def write(path: Path, records: Iterable[Record]) -> int:
    """Write records as JSON Lines, and return their number."""
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    replace(path, "".join(lines).encode(errors="replace"))
    return len(lines)
