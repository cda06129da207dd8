"""The benchmark of domain adaptation: its texts and questions, and a tiny run of it."""

import ast
import json
import subprocess
import sys
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from matplotlib.image import imread

from benchmarks.domain_adaptation.documentation import Entry, documentation, without_docstrings, write_data
from benchmarks.domain_adaptation.run import Method, summary
from fira.data.sources import input_files
from tests.launch import ROOT, inherited

SOURCE = '''"""A module."""
import os


class Point:
    """A point. With
    more text."""

    def move(self, dx, *, dy=0):
        """Move the point by dx
        and dy. Return None.

        Twice.
        """
        return f"""not a docstring {dx}"""

    def _private(self):
        """Not documented."""


def short():
    "Be short."
'''
CODE = '''import os


class Point:

    def move(self, dx, *, dy=0):
        return f"""not a docstring {dx}"""

    def _private(self):


def short():
'''


def test_source_is_divided_into_code_and_documentation() -> None:
    tree = ast.parse(SOURCE)
    assert without_docstrings(SOURCE, tree) == CODE
    assert [*documentation(tree, "shape")] == [
        Entry("shape.Point\n\nA point. With\nmore text.\n", "A point.", None),
        Entry(
            "shape.Point.move(self, dx, *, dy=0)\n\nMove the point by dx\nand dy. Return None.\n\nTwice.\n",
            "Move the point by dx and dy.",
            "What does shape.Point.move do?",
        ),
        Entry("shape.short()\n\nBe short.\n", "Be short.", None),
    ]


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_held_out_questions_are_not_in_the_training_data(tmp_path: Path) -> None:
    data = write_data(tmp_path, input_files(None)[:60])
    general, general_test, domain, domain_test, pairs, examples, chats = map(records, astuple(data))
    assert min(map(len, (general, general_test, domain, domain_test, pairs, examples))) >= 3
    trained = {pair["completion"] for pair in pairs}
    names = {text["text"].partition("(")[0].partition("\n")[0] for text in domain}
    assert {pair["prompt"].split()[2] for pair in pairs} <= names
    for example in examples:
        assert len(set(example["choices"])) == 4
        assert not trained & set(example["choices"])
        assert example["query"].split()[2] not in names
    answers = {text["text"].partition("(")[0]: " ".join(text["text"].split()) for text in domain_test}
    known = [example for example in examples if example["query"].split()[2] in answers]
    assert known
    for example in known:
        answer = example["choices"][example["answer"]].removesuffix(".")
        assert answer in answers[example["query"].split()[2]]
    assert [chat | {"query": chat["query"][0]["content"]} for chat in chats] == examples


TINY = """
import sys
from pathlib import Path
from benchmarks.domain_adaptation.run import Method, Setting, draw, measure
from fira.data.sources import input_files

folder = Path(sys.argv[1])
setting = Setting(("--vocab-size", "300", "--model-set", "d_model=32,num_layers=1"), 4, 3, 2, batch=4)
results = measure(folder, input_files(None)[:30], [3], [Method("LoRA", 0.05, general=0.2, lora=True)], setting)
results.to_csv(folder / "results.csv")
draw(results, folder / "results.png")
"""


@pytest.mark.slow
def test_tiny_benchmark(tmp_path: Path) -> None:
    variables = inherited() | {"FIRA_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", TINY, tmp_path]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stderr
    results = pd.read_csv(tmp_path / "results.csv", index_col=0)
    assert results[["method", "trained_on"]].to_numpy().tolist() == [
        [method, stage] for method in ("base", "LoRA") for stage in ("text", "questions")
    ]
    losses = results[["domain_loss", "general_loss"]]
    assert losses.nunique().tolist() == [4, 4]
    assert losses.min().min() > 1
    assert losses.max().max() < 6.5  # ln 300 is 5.7
    assert results["answer_loss"].isna().tolist() == [True, False, True, False]
    assert results["accuracy"].between(0, 1).all()
    seed = tmp_path / "seed-3"
    assert 'lora = "rank=16' in (seed / "LoRA_questions" / "config.toml").read_text()
    assert 'general.jsonl=0.2"' in (seed / "LoRA" / "config.toml").read_text()
    assert imread(tmp_path / "results.png").std() > 0.05


def test_summary_has_means_and_deviations() -> None:
    rows = [
        {"method": "full", "trained_on": "text", "domain_loss": loss, "general_loss": 3, "accuracy": 0.5}
        for loss in (1.0, 2.0, 3.0)
    ]
    table = summary(pd.DataFrame(rows).assign(answer_loss=None))
    assert table.splitlines()[-1] == "| full | text | 2.000 ± 1.000 | 3.000 ± 0.000 |  | 0.500 ± 0.000 |"


def test_method_without_general_text_reads_the_domain_only(tmp_path: Path) -> None:
    data = write_data(tmp_path, input_files(None)[:30])
    assert Method("full", 1e-3).text(data) == str(data.domain)
    assert Method("mixed", 1e-3, general=0.2).text(data) == f"{data.domain}=0.8,{data.general}=0.2"
