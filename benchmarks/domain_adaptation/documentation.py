"""Texts of two kinds, and questions, which every installation of Python contains.

general     the source code of the standard library, without docstrings
domain      its documentation: the name, the parameters and the docstring of each public function and class
questions   "What does posixpath.join do?", answered by the first sentence of the docstring

A tenth of the modules, chosen by a hash of the name, is held out: their code, documentation and questions are tests.
A docstring that begins like an earlier one is skipped, so that no answer to a test question is trained.
"""

import ast
import hashlib
import json
import random
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

SKIPPED = ("encodings", "pydoc_data")  # tables, and documentation
GENERAL_CHARACTERS = 3_000_000  # of the training text, about twice as many as are read
TEST_CHARACTERS, PART = 40_000, 2_000  # of each test text, and of each document in it
QUESTIONS, CHOICES = 300, 4  # of the test
SUMMARY = range(20, 121)  # characters of an answer


class Entry(NamedTuple):
    """Documentation of a function or class. question: None for a class, or if the answer is too short or too long."""

    text: str
    summary: str
    question: str | None


@dataclass(frozen=True)
class Data:
    """Paths of the files. Test questions exist as text, and as a chat."""

    general: Path
    general_test: Path
    domain: Path
    domain_test: Path
    questions: Path
    questions_test: Path
    chats_test: Path


def write_data(folder: Path, sources: Sequence[Path]) -> Data:
    """Write all files to a folder. sources: Python files of the standard library."""
    code: dict[bool, list[str]] = {True: [], False: []}
    entries: dict[bool, list[Entry]] = {True: [], False: []}
    seen: set[str] = set()
    for path in sources:
        module = module_name(path)
        if not module.startswith(SKIPPED):
            source = path.read_text(encoding="utf-8", errors="replace")
            tree = ast.parse(source)
            test = is_held_out(module)
            code[test].append(without_docstrings(source, tree))
            new = [entry for entry in documentation(tree, module) if entry.summary not in seen]
            entries[test] += {entry.summary: entry for entry in new}.values()
            seen |= {entry.summary for entry in new}
    texts = {test: [entry.text for entry in entries[test]] for test in entries}
    examples = multiple_choice([entry for entry in entries[True] if entry.question])
    chats = [example | {"query": [{"role": "user", "content": example["query"]}]} for example in examples]
    pairs = [{"prompt": entry.question, "completion": entry.summary} for entry in entries[False] if entry.question]
    return Data(
        general=write(folder / "general.jsonl", as_records(sample(code[False], GENERAL_CHARACTERS))),
        general_test=write(
            folder / "general_test.jsonl", as_records(sample([text[:PART] for text in code[True]], TEST_CHARACTERS))
        ),
        domain=write(folder / "domain.jsonl", as_records(texts[False])),
        domain_test=write(
            folder / "domain_test.jsonl", as_records(sample([text[:PART] for text in texts[True]], TEST_CHARACTERS))
        ),
        questions=write(folder / "questions.jsonl", pairs),
        questions_test=write(folder / "questions_test.jsonl", examples),
        chats_test=write(folder / "chats_test.jsonl", chats),
    )


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(sysconfig.get_path("stdlib")).with_suffix("").parts).removesuffix(".__init__")


def is_held_out(module: str) -> bool:
    return hashlib.sha256(module.encode()).digest()[0] < 256 / 10


def without_docstrings(source: str, tree: ast.Module) -> str:
    """The lines of a source file without those of its docstrings."""
    removed: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and has_docstring(node):
            removed |= {*range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1)}
    return "".join(line for number, line in enumerate(source.splitlines(True), 1) if number not in removed)


def has_docstring(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return ast.get_docstring(node, clean=False) is not None


def documentation(node: ast.AST, name: str) -> Iterator[Entry]:
    """Yield the documentation of the public functions and classes in a module or class. name: its full name."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not child.name.startswith("_"):
            full = f"{name}.{child.name}"
            if text := (ast.get_docstring(child) or "").strip():
                summary = " ".join(text.partition("\n\n")[0].split()).partition(". ")[0].rstrip(".") + "."
                is_class = isinstance(child, ast.ClassDef)
                asked = not is_class and len(summary) in SUMMARY
                parameters = "" if isinstance(child, ast.ClassDef) else f"({ast.unparse(child.args)})"
                yield Entry(f"{full}{parameters}\n\n{text}\n", summary, f"What does {full} do?" if asked else None)
            if isinstance(child, ast.ClassDef):
                yield from documentation(child, full)


def multiple_choice(entries: list[Entry]) -> list[dict[str, Any]]:
    """Questions with the answers to three others as wrong choices."""
    chooser = random.Random(0)
    chooser.shuffle(entries)
    examples = []
    for entry in entries[:QUESTIONS]:
        choices = chooser.sample([other.summary for other in entries if other is not entry], CHOICES - 1)
        answer = chooser.randrange(CHOICES)
        choices.insert(answer, entry.summary)
        examples.append({"query": entry.question, "choices": choices, "answer": answer})
    return examples


def sample(texts: list[str], characters: int) -> list[str]:
    """Texts in random order, at most as many as have this number of characters together."""
    chosen = []
    for text in random.Random(0).sample(texts, len(texts)):
        if len(text) <= characters:
            chosen.append(text)
            characters -= len(text)
    return chosen


def as_records(texts: Iterable[str]) -> list[dict[str, Any]]:
    return [{"text": text} for text in texts]


def write(path: Path, records: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path
