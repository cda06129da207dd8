"""Forged checkpoints and exports: changes of JSON values, of bytes, of safetensors headers, and of whole files.

A forgery is a list [kind, file, …] that `apply` makes to a folder, so that one can also be written in a JSON file:

    ["json", file, path, value]     replace the value at the path of keys and indices; ["json", file, path] removes it
    ["header", file, path, value]   the same in the header of a safetensors file
    ["flip", file, position, bit]   change one bit of the byte at this fraction of the file's length
    ["cut", file, position]         remove everything from there on
    ["text", file, text, count]     replace the content by a text, repeated
    ["sparse", file]                make the file a terabyte long without using the disk
    ["remove", file], ["rename", file, name], ["folder", file], ["pipe", file], ["link", file, target]
"""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from fira.checkpoint.manifest import seal

Forgery = list[Any]

VALUES = st.one_of(
    st.sampled_from([None, True, False, 0, -1, 1, 2, 7, 10**9, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, float("nan")]),
    st.sampled_from(["", "x", "1", "../x", "/etc/passwd", "a\0b", "\n", "\ud800", "F64", "I64", "yarn", "x" * 5000]),
    st.sampled_from([[], {}, [[]], [0], [2**40, 2**40], {"": 0}, [None] * 9]),
    st.integers(-(2**65), 2**65),
    st.floats(),
    st.text(max_size=8),
)
NAMES = st.sampled_from(["model.safetensors", "config.json", "x", "MODEL.SAFETENSORS", "index.json", "é.json"])
FRACTIONS = st.floats(0, 1, exclude_max=True)


def paths(document: Any) -> list[list[Any]]:
    """Return the path of every value in a JSON document."""
    entries: Any = document.items() if isinstance(document, dict) else ()
    entries = enumerate(document) if isinstance(document, list) else entries
    return [[]] + [[key, *path] for key, value in entries for path in paths(value)]


@st.composite
def forgeries(draw: Callable[..., Any], files: dict[str, Any]) -> Forgery:
    """Draw a forgery. files: the JSON document, or the header, of each file that is read from the folder."""
    file = draw(st.sampled_from(sorted(files)))
    kind = draw(st.sampled_from(["json"] * 6 + ["flip", "flip", "cut", "text", "remove", "rename", "folder", "pipe"]))
    if kind == "json":
        chosen = draw(st.sampled_from(paths(files[file])))
        value = [] if draw(st.integers(0, 4)) == 0 else [draw(VALUES)]
        return ["header" if file.endswith(".safetensors") else "json", file, chosen, *value]
    if kind == "flip":
        return [kind, file, draw(FRACTIONS) ** 3, draw(st.integers(0, 7))]  # most of them in a header
    if kind == "cut":
        return [kind, file, draw(FRACTIONS)]
    if kind == "text":
        return [kind, file, draw(st.sampled_from(["", "[", '{"a":', "\0", "{}", "[]", "1", "null", "NaN"])), 2000]
    return [kind, file, draw(NAMES)] if kind == "rename" else [kind, file]


def apply(folder: Path, forgery: Forgery, reseal: bool) -> None:
    """Make a forgery in a folder. reseal: update the hashes of its manifest, as a forger would."""
    kind, name, *values = forgery
    path = folder / name
    if kind == "json":
        path.write_text(_dump(_replaced(json.loads(path.read_text()), *values)))
    elif kind == "header":
        raw = path.read_bytes()
        end = 8 + int.from_bytes(raw[:8], "little")
        header = _dump(_replaced(json.loads(raw[8:end]), *values)).encode(errors="replace")
        path.write_bytes(len(header).to_bytes(8, "little") + header + raw[end:])
    elif kind == "flip":
        raw = bytearray(path.read_bytes())
        raw[int(values[0] * len(raw))] ^= 1 << values[1]
        path.write_bytes(raw)
    elif kind == "cut":
        os.truncate(path, int(values[0] * path.stat().st_size))
    elif kind == "sparse":
        os.truncate(path, 2**40)
    elif kind == "text":
        path.write_text(values[0] * values[1])
    elif kind == "rename":
        path.rename(folder / values[0])
    else:
        path.unlink()
        {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path), "remove": lambda: None}.get(
            kind, lambda: path.symlink_to(values[0])
        )()
    if reseal and (folder / "manifest.json").is_file():
        _reseal(folder, [] if name == "manifest.json" else [name])


def _dump(document: Any) -> str:
    return json.dumps(document, indent=1) + "\n"  # the format of a checkpoint's documents


def _replaced(document: Any, path: list[Any], *value: Any) -> Any:
    if not path:
        return value[0] if value else {}
    place = document
    for key in path[:-1]:
        place = place[key]
    if value:
        place[path[-1]] = value[0]
    else:
        del place[path[-1]]
    return document


def _reseal(folder: Path, changed: list[str]) -> None:
    """Recompute size and hash of changed files in the manifest, and the hash of the manifest, if it still is one."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest.pop("sha256", None)
        for name in changed:
            raw = (folder / name).read_bytes() if (folder / name).is_file() else b""
            manifest["files"][name] = {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
        (folder / "manifest.json").write_bytes(seal(manifest))
    except (ValueError, TypeError, AttributeError, KeyError, OSError, RecursionError):
        return


def documents(folder: Path, names: list[str]) -> dict[str, Any]:
    """Return the JSON document, or the safetensors header, of each file."""
    found = {}
    for name in names:
        raw = (folder / name).read_bytes()
        found[name] = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")] if name.endswith("rs") else raw)
    return found
