"""JSON documents that do not follow their schema raise a UserError with the place of the first difference."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from fira.errors import UserError
from fira.json_reader import anything, array, integer, mapping, nullable, number, parse, read, record, scalar, text

SCHEMA = record(
    {"step": integer(0, 9), "names": array(text("[a-z]+", "a name"), longest=2)},
    {"scale": nullable(number(0)), "files": mapping(record({"size": integer()})), "note": scalar},
)
VALID = {"step": 3, "names": ["a", "b"], "scale": 0.5, "files": {"x": {"size": 1}}, "note": None, "unknown": [1]}
SOURCE = Path("x.json")


def error(raw: bytes, schema: Any = SCHEMA) -> str:
    """The message of the UserError, or an empty string."""
    try:
        parse(raw, SOURCE, schema)
    except UserError as caught:
        return str(caught)
    return ""


def test_valid_document_is_returned_unchanged() -> None:
    assert parse(json.dumps(VALID).encode(), SOURCE, SCHEMA) == VALID


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": -1}, "step is -1, not an integer from 0 to 9"),
        ({"step": 10}, "step is 10"),
        ({"step": True}, "step is True"),
        ({"step": 3.0}, "step is 3.0"),
        ({"step": "3"}, "step is '3'"),
        ({"step": None}, "step is None"),
        ({"names": "ab"}, "names is 'ab', not an array"),
        ({"names": ["a", "b", "c"]}, "names is a container of 3 entries, not an array of up to 2"),
        ({"names": ["a", 1]}, "names[1] is 1, not a name"),
        ({"names": ["a\n"]}, "names[0] is 'a\\n', not a name"),
        ({"names": ["\ud800"]}, "names[0] is '\\ud800', not a name"),
        ({"scale": -0.5}, "scale is -0.5, not a finite number"),
        ({"scale": False}, "scale is False"),
        ({"scale": 10**400}, "scale is 1000"),
        ({"files": {"x": {}}}, "files.x.size is missing"),
        ({"files": {"x": 3}}, "files.x is 3, not an object"),
        ({"files": {"\n": {"size": 1}}}, "a key of files is '\\n', not a name"),
        ({"files": {"x" * 256: {"size": 1}}}, "a key of files is 'xxx"),
        ({"files": {"x" * 255: 3}}, "is 3, not an object"),
        ({"files": []}, "files is a container of 0 entries, not an object"),
        ({"note": [1]}, "note is a container of 1 entries"),
        ({"note": {}}, "note is a container"),
    ],
)
def test_invalid_value_is_named(change: dict[str, Any], message: str) -> None:
    found = error(json.dumps(VALID | change).encode())
    assert found.startswith("x.json is invalid: ")
    assert message in found
    assert found.isprintable()
    assert len(found) < 300


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b"[" * 40 + b"]" * 40, "nested too deeply"),
        (b'{"a":' * 40 + b"1" + b"}" * 40, "nested too deeply"),
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"NaN", "NaN is not a number of JSON"),
        (b"-Infinity", "-Infinity is not a number of JSON"),
        (b'{"a": 1, "a": 2}', "a key occurs twice"),
    ],
)
def test_text_that_is_refused_before_its_schema(raw: bytes, message: str) -> None:
    assert message in error(raw, anything)


def test_nesting_up_to_the_limit_is_accepted() -> None:
    assert error(b"[" * 32 + b"]" * 32, anything) == ""


def test_a_large_number_is_not_finite() -> None:
    assert "is inf, not a finite number" in error(b"1e999", number())


def test_a_missing_file_and_a_pipe_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("nothing", "pipe"):
        with pytest.raises(UserError, match=f"{name} is missing or not a regular file"):
            read(tmp_path / name, anything)


def test_a_file_is_read_up_to_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "zeros.json"
    path.touch()
    os.truncate(path, 2**40)  # a sparse file; reading it as a whole would need a terabyte
    with pytest.raises(UserError, match=r"zeros\.json is too large"):
        read(path, anything, size=1000)
