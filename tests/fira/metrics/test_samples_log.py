"""The file of text samples: order, repeated steps, and other files."""

import json
from pathlib import Path

import pytest

from fira.errors import UserError
from fira.json_reader import complete_objects
from fira.metrics.samples_log import Sample, SamplesLog

ODD = "\u2028x\x85\u2029y\r\x0c"  # characters that end a line in other conventions


def test_samples_of_repeated_steps_are_replaced(tmp_path: Path) -> None:
    log = SamplesLog(tmp_path / "samples.jsonl")
    log.keep(0)  # of a new run
    assert not log.path.exists()
    for step in (5, 10, 15):
        log.write(step, [Sample("नमस्ते ", f"at {step}\n"), Sample("def ", ODD)])
    log.keep(10)
    log.write(10, [Sample("def ", "again")])
    found = [json.loads(line) for line in log.path.read_text(encoding="utf-8").split("\n")[:-1]]
    assert complete_objects(log.path) == found
    assert found == [
        {"step": 5, "prompt": "नमस्ते ", "text": "at 5\n"},
        {"step": 5, "prompt": "def ", "text": ODD},
        {"step": 10, "prompt": "def ", "text": "again"},
    ]


@pytest.mark.parametrize("content", ["my notes\n", "[1]\n", '{"prompt": "a"}\n'])
def test_other_file_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=r"samples\.jsonl: not a log of samples .*; move it away"):
        SamplesLog(path).keep(3)
