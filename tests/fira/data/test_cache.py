import json
import logging
from pathlib import Path

import numpy as np
import pytest

from fira.data import cache as module
from fira.data.cache import CHECKSUMS, damaged_file
from fira.data.corpus import Corpus, prepare

TEXT = "".join(f"Line {i} of a text about {i % 7} hills.\n" for i in range(400))


@pytest.fixture
def corpus(tmp_path, monkeypatch) -> Corpus:
    monkeypatch.setenv("FIRA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.txt").write_text(TEXT)
    return prepare(str(tmp_path / "a.txt"), vocab_size=300)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["train-0.npy", "val-0.npy", "tokenizer.json", "summary.json", CHECKSUMS])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damaged_file_of_the_cache_is_named_and_prepared_again(
    corpus, tmp_path, caplog, name: str, damage: str
) -> None:
    path = corpus.folder / name
    original = contents(corpus.folder)
    if damage == "flip":
        changed = bytearray(original[name])
        changed[len(changed) // 2] ^= 1
        path.write_bytes(changed)
    elif damage == "truncate":
        path.write_bytes(original[name][:-1] if name != CHECKSUMS else original[name][:20])
    else:
        path.unlink()
    with caplog.at_level(logging.WARNING):
        again = prepare(str(tmp_path / "a.txt"), vocab_size=300)
    assert again.folder == corpus.folder
    assert contents(again.folder) == original
    assert [path.name for path in corpus.folder.parent.iterdir()] == [corpus.folder.name]
    (record,) = caplog.records
    assert f"{corpus.folder.name}/" in record.getMessage()
    assert "damaged" in record.getMessage()
    assert name == CHECKSUMS or f"{name}: damaged" in record.getMessage()


def test_open_tokens_can_be_read_while_the_cache_is_replaced(corpus, tmp_path) -> None:
    tokens = corpus.sources[0].train
    expected = tokens.read(0, len(tokens))
    (corpus.folder / "summary.json").unlink()
    prepare(str(tmp_path / "a.txt"), vocab_size=300)
    np.testing.assert_array_equal(tokens.read(0, len(tokens)), expected)


@pytest.mark.parametrize("content", ["[" * 100_000, "{", "[]", '{"train-0.npy": "1"}'])
def test_invalid_checksums_are_a_damage(corpus, content: str) -> None:
    (corpus.folder / CHECKSUMS).write_text(content)
    assert damaged_file(corpus.folder, progress=False) == corpus.folder / CHECKSUMS


def test_undamaged_cache_is_used(corpus, tmp_path, monkeypatch) -> None:
    assert damaged_file(corpus.folder, progress=False) is None
    assert set(json.loads((corpus.folder / CHECKSUMS).read_text())) == set(contents(corpus.folder)) - {CHECKSUMS}
    before = {path.name: path.stat().st_mtime_ns for path in corpus.folder.iterdir()}
    again = prepare(str(tmp_path / "a.txt"), vocab_size=300)
    assert {path.name: path.stat().st_mtime_ns for path in again.folder.iterdir()} == before


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"0" * 63, b"../" * 20])
def test_damaged_hash_of_a_large_file_is_computed_again(corpus, tmp_path, monkeypatch, content: bytes) -> None:
    monkeypatch.setattr(module, "HASH_CACHE_SIZE", 1000)
    data = str(tmp_path / "a.txt")
    assert prepare(data, vocab_size=300).folder == corpus.folder
    (cached,) = (tmp_path / "cache" / "sha256").iterdir()
    correct = cached.read_bytes()
    cached.write_bytes(content)
    assert prepare(data, vocab_size=300).folder == corpus.folder
    assert cached.read_bytes() == correct
