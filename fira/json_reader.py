"""Reader of JSON documents that other programs may have written or changed: size and depth limits, and a schema.

    STATE = record({"step": integer(), "loader": record({"consumed": integer()})})
    state = read(path, STATE)

A schema is a function of a value and the name of its place in the document. It raises UserError if the value has
another type or is out of range. Keys that a schema does not name are ignored, so that later versions can add some.
"""

import json
import re
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fira import files
from fira.errors import UserError

Schema = Callable[[Any, str], None]

SIZE = 64 * 2**20  # bytes; a parsed document may take 20 times as much memory
DEPTH = 32  # arrays and objects inside each other
LARGEST = 2**53  # integers up to this one are exact in every JSON library
REMEDY = "restore or correct it"


def read(path: Path, schema: Schema, size: int = SIZE) -> Any:
    """Read a JSON file of at most `size` bytes. Raises UserError, which names it, if it does not follow `schema`."""
    return parse(files.read(path, size), path, schema)


def parse(raw: bytes, source: Path, schema: Schema) -> Any:
    """Parse the content of the file `source`, which `files.read` has limited; see `read`."""
    try:
        document = json.loads(raw, object_pairs_hook=_object, parse_constant=_refuse_constant)
    except RecursionError:
        raise UserError(f"{source} is nested too deeply; {REMEDY}") from None
    except ValueError as error:
        raise UserError(f"{source} is not valid JSON: {_shortened(str(error))}; {REMEDY}") from None
    if _is_deeper(document, DEPTH):
        raise UserError(f"{source} is nested too deeply; {REMEDY}")
    check(document, source, schema)
    return document


def complete_objects(path: Path) -> list[dict[str, Any]]:
    """The objects in a log with one JSON object per line, to which another process may be writing.

    Other lines, such as an incomplete last one, are left out, and a file that cannot be read is empty.
    """
    found = []
    with suppress(OSError):
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            with suppress(ValueError):
                entry = json.loads(line)
                found += [entry] if isinstance(entry, dict) else []
    return found


def check(document: Any, source: Path, schema: Schema) -> None:
    """Raise UserError, which names the file `source`, if a parsed document does not follow `schema`."""
    try:
        schema(document, "")
    except UserError as error:
        raise UserError(f"{source} is invalid: {error}; {REMEDY}") from None


def anything(value: Any, place: str) -> None:
    """Schema of any value."""


def integer(low: int = 0, high: int = LARGEST) -> Schema:
    """Schema of integers from `low` to `high`."""

    def schema(value: Any, place: str) -> None:
        _require(type(value) is int and low <= value <= high, value, place, f"an integer from {low} to {high}")

    return schema


def number(low: float = -sys.float_info.max, high: float = sys.float_info.max) -> Schema:
    """Schema of finite numbers from `low` to `high`."""

    def schema(value: Any, place: str) -> None:
        _require(
            type(value) in (int, float) and low <= value <= high,
            value,
            place,
            f"a finite number from {low:g} to {high:g}",
        )

    return schema


def text(pattern: str = r".{,255}", meaning: str = "a line of text") -> Schema:
    """Schema of printable strings that match a regular expression as a whole; `meaning` describes them in messages."""
    compiled = re.compile(pattern)

    def schema(value: Any, place: str) -> None:
        matches = isinstance(value, str) and value.isprintable() and compiled.fullmatch(value)
        _require(bool(matches), value, place, meaning)

    return schema


def scalar(value: Any, place: str) -> None:
    """Schema of strings, numbers, booleans and null."""
    _require(not isinstance(value, dict | list), value, place, "a string, a number, true, false or null")


def nullable(schema: Schema) -> Schema:
    """Schema of null and of values that follow `schema`."""
    return lambda value, place: None if value is None else schema(value, place)


def array(item: Schema, longest: int = LARGEST) -> Schema:
    """Schema of arrays of at most `longest` items."""

    def schema(value: Any, place: str) -> None:
        _require(isinstance(value, list) and len(value) <= longest, value, place, f"an array of up to {longest} items")
        for index, entry in enumerate(value):
            item(entry, f"{place}[{index}]")

    return schema


def mapping(item: Schema) -> Schema:
    """Schema of objects whose values all follow `item`; keys are printable and not longer than a file name."""

    def schema(value: Any, place: str) -> None:
        _require(isinstance(value, dict), value, place, "an object")
        for key, entry in value.items():
            _require(key.isprintable() and len(key) <= 255, key, f"a key of {place or 'the document'}", "a name")
            item(entry, _join(place, key))

    return schema


def record(required: Mapping[str, Schema], optional: Mapping[str, Schema] | None = None) -> Schema:
    """Schema of objects that have the keys `required`, and may have the keys `optional` and others."""
    schemas = {**required, **(optional or {})}

    def schema(value: Any, place: str) -> None:
        _require(isinstance(value, dict), value, place, "an object")
        for key in required:
            if key not in value:
                raise UserError(f"{_join(place, key)} is missing")
        for key in schemas.keys() & value.keys():
            schemas[key](value[key], _join(place, key))

    return schema


def _require(valid: bool, value: Any, place: str, expected: str) -> None:
    if not valid:
        shown = f"a container of {len(value)} entries" if isinstance(value, dict | list) else _shortened(repr(value))
        raise UserError(f"{place or 'the document'} is {shown}, not {expected}")


def _join(place: str, key: str) -> str:
    return f"{place}.{_shortened(key)}" if place else _shortened(key)


def _shortened(shown: str) -> str:
    """Return a text as one printable line of limited length."""
    line = shown if shown.isprintable() else ascii(shown)
    return line if len(line) <= 80 else line[:80] + "…"


def _is_deeper(document: Any, limit: int) -> bool:
    level = [document]
    for _ in range(limit + 1):
        containers = [entry for entry in level if isinstance(entry, dict | list)]
        level = [child for entry in containers for child in (entry.values() if isinstance(entry, dict) else entry)]
    return bool(level)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; of two equal keys, other programs may use the other one."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key occurs twice in an object")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")
