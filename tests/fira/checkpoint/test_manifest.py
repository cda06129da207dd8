"""Manifest and index: damaged, incomplete and foreign folders raise an error that names the file."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from fira.checkpoint.manifest import StoredRows, TensorEntry, encode_json, is_plain
from fira.checkpoint.shards import Checkpoint
from fira.errors import UserError
from tests.fira.checkpoint.checkpoint_files import FILES, MODEL, edit_index, edit_manifest
from tests.ranks.checkpoint_ranks import open_error, save_state


@pytest.mark.parametrize("name", FILES)
def test_flipped_bit_raises_error_naming_the_file(root: Path, name: str) -> None:
    folder = Path(save_state(str(root), 1))
    raw = (folder / name).read_bytes()
    for position in {*range(0, len(raw), 13), len(raw) - 1}:
        damaged = bytearray(raw)
        damaged[position] ^= 1 << position % 8
        (folder / name).write_bytes(damaged)
        message = open_error(str(folder))
        assert f"{folder / name} " in message, position
        assert "\n" not in message
    (folder / name).write_bytes(raw)
    assert open_error(str(folder)) == ""


@pytest.mark.parametrize("name", FILES)
def test_file_of_another_size_or_missing_file_is_named(root: Path, name: str) -> None:
    folder = Path(save_state(str(root), 1))
    size = (folder / name).stat().st_size
    for length in (size + 1, size - 1, size // 2, 0):
        os.truncate(folder / name, length)
        message = open_error(str(folder))
        assert name in message
        assert name == "manifest.json" or f" has {length} bytes, its manifest lists {size}" in message
    (folder / name).unlink()
    assert name in open_error(str(folder))


def test_folder_without_valid_manifest_raises(tmp_path: Path, root: Path) -> None:
    for content in ("[]", "{}", '{"manifest_version": 2}', "not JSON", "\0"):
        (tmp_path / "manifest.json").write_text(content)
        assert f"{tmp_path / 'manifest.json'} is" in open_error(str(tmp_path))
    assert "is not a checkpoint" in open_error(str(tmp_path / "nowhere"))
    folder = Path(save_state(str(root), 1))
    for version in (0, 2):
        edit_manifest(folder, lambda manifest, version=version: manifest.update(version=version))
        assert f"format version {version}" in open_error(str(folder))


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "..", ".", "", "a/b", "a\\b", "a\0"])
def test_manifest_cannot_list_a_file_outside_its_folder(root: Path, name: str) -> None:
    folder = Path(save_state(str(root), 1))
    (root / "x").write_text("secret")
    edit_manifest(folder, lambda manifest: manifest["files"].update({name: {"size": 6, "sha256": "0" * 64}}))
    message = open_error(str(folder))
    assert f"{folder / 'manifest.json'}" in message
    assert f"{name!r} is missing or not a plain file name" in message or f"{name!r}, not a name" in message
    assert not is_plain(name)


def test_index_without_every_row_exactly_once_raises(root: Path) -> None:
    changes: list[Callable[[dict], object]] = [
        lambda tensors: tensors["embedding.weight"].update(shape=[12, 3]),
        lambda tensors: tensors["embedding.weight"].update(parts=[]),
        lambda tensors: tensors["embedding.weight"].update(dtype="float31"),
        lambda tensors: tensors["embedding.weight"]["parts"][0].update(start=1),
        lambda tensors: tensors["embedding.weight"]["parts"].append({"file": MODEL, "start": 10, "rows": 1}),
        lambda tensors: tensors["embedding.weight"]["parts"][0].update(file="../../x"),
        lambda tensors: tensors["embedding.weight"].pop("shape"),
        lambda tensors: tensors["embedding.weight"].update(parts="none"),
    ]
    for step, change in enumerate(changes):
        folder = Path(save_state(str(root), step))
        edit_index(folder, change)
        assert f"{folder / 'index.json'} " in open_error(str(folder)), step


def test_index_that_differs_from_the_stored_tensor_raises_on_read(root: Path) -> None:
    for step, change in enumerate(({"dtype": "float16"}, {"shape": [11, 1]}, {"shape": [11]})):
        folder = Path(save_state(str(root), step))
        edit_index(folder, lambda tensors, change=change: tensors["embedding.weight"].update(change))
        with pytest.raises(
            UserError, match=f"{MODEL}: embedding.weight does not have the shape and dtype in index.json"
        ):
            Checkpoint.open(folder).read("embedding.weight")


@pytest.mark.parametrize("name", FILES[:-1])
def test_equal_size_but_other_content_does_not_match_the_hash(root: Path, name: str) -> None:
    """The hash of every file is compared, not only its size, also where the manifest itself is valid."""
    folder = Path(save_state(str(root), 1))
    other = {"size": (folder / name).stat().st_size, "sha256": "0" * 64}
    edit_manifest(folder, lambda manifest: manifest["files"].update({name: other}))
    assert open_error(str(folder)).startswith(f"{folder / name} does not match its SHA-256")


def test_manifest_must_list_the_index_and_a_record_per_file(root: Path) -> None:
    changes: list[tuple[str, Callable[[dict], object]]] = [
        ("'index.json' is missing", lambda manifest: manifest["files"].pop("index.json")),
        ("files.x.sha256 is missing", lambda manifest: manifest["files"].update(x={"size": 1})),
        ("layout is missing", lambda manifest: manifest.pop("layout")),
        ("step is '1', not an integer", lambda manifest: manifest.update(step="1")),
        ("files is a container of 2 entries, not an object", lambda manifest: manifest.update(files=[1, 2])),
    ]
    for step, (message, change) in enumerate(changes):
        folder = Path(save_state(str(root), step))
        edit_manifest(folder, change)
        assert message in open_error(str(folder))


def test_manifest_of_another_step_is_refused(root: Path) -> None:
    folder = Path(save_state(str(root), 1))
    edit_manifest(folder, lambda manifest: manifest.update(step=7))
    assert "is the manifest of step 7, in the folder of another step" in open_error(str(folder))
    copied = folder.rename(root / "best")  # the name of a copy says nothing about the step
    assert open_error(str(copied)) == ""


def test_index_cannot_list_more_data_than_its_files_contain(root: Path) -> None:
    """Otherwise memory for the listed size would be allocated before the file is read."""
    folder = Path(save_state(str(root), 1))
    edit_index(folder, lambda tensors: tensors["embedding.weight"].update(shape=[11, 2**40]))
    assert f"bytes of tensors in {MODEL}, which has" in open_error(str(folder))


def test_json_text_is_that_of_the_format() -> None:
    """The SHA-256 of a manifest covers its text, so with another text no existing checkpoint could be read."""
    assert encode_json({"a": [1], "b": "é"}) == b'{\n "a": [\n  1\n ],\n "b": "\\u00e9"\n}\n'


@pytest.mark.parametrize(
    ("shape", "spans", "complete"),
    [
        ((5, 2), [(0, 5)], True),
        ((5, 2), [(3, 2), (0, 3)], True),  # in any order
        ((5, 2), [(0, 0), (0, 5), (5, 0)], True),  # empty shards
        ((5, 2), [(0, 4)], False),
        ((5, 2), [(1, 4)], False),
        ((5, 2), [(0, 6)], False),
        ((5, 2), [(0, 3), (2, 3)], False),  # overlap
        ((5, 2), [(0, 3), (1, 2)], False),  # overlap and gap at the end
        ((5, 2), [(0, 2), (3, 2)], False),  # gap
        ((5, 2), [(0, 5), (0, 5)], False),
        ((5, 2), [(0, 6), (6, -1)], False),
        ((), [(0, 1)], True),
        ((), [(0, 0)], False),
        ((0, 3), [(0, 0)], True),
        ((0, 3), [], False),
    ],
)
def test_entry_is_complete_where_the_spans_cover_every_row_once(
    shape: tuple[int, ...], spans: list[tuple[int, int]], complete: bool
) -> None:
    parts = tuple(StoredRows("file", start, rows) for start, rows in spans)
    assert TensorEntry(shape, "float32", parts).is_complete() is complete
    assert not TensorEntry(shape, "complex64", parts).is_complete()
