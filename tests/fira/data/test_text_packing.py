"""A preparation that is interrupted at any document, and continued, against one without an interruption."""

import gzip
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fira.data import preparation, text_packing, text_stream
from fira.data.corpus import prepare
from fira.data.packed import TokenWriter
from tests.launch import ROOT

STORIES = [f"Story {i}: the fox number {i * i} ran over {'a hill and ' * (i % 7)}home.\n" for i in range(300)]


@pytest.fixture
def data(tmp_path) -> Path:
    """A folder with three files, one of them compressed."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(3):
        rows = "".join(json.dumps({"text": text}) + "\n" for text in STORIES[number::3]).encode()
        name = f"{number}.jsonl" + (".gz" if number == 1 else "")
        (folder / name).write_bytes(gzip.compress(rows, mtime=0) if number == 1 else rows)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def interrupt(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Raise KeyboardInterrupt, which keeps the temporary folder, after so many documents; save after each."""
    append, count = TokenWriter.append, iter(range(after))

    def limited(self: TokenWriter, ids: Any) -> None:
        if next(count, None) is None:
            self._file.write(b"a part of the next document")
            raise KeyboardInterrupt
        append(self, ids)

    monkeypatch.setattr(TokenWriter, "append", limited)
    monkeypatch.setattr(text_packing, "SAVED_EVERY_S", -1)


@pytest.mark.parametrize("after", [0, 1, 99, 100, 101, 250, 299])
def test_continued_preparation_is_bitwise_identical(data, tmp_path, monkeypatch, after: int) -> None:
    expected = contents(prepare(str(data), vocab_size=400, cache_dir=tmp_path / "expected").folder)
    with monkeypatch.context() as interrupted:
        interrupt(interrupted, after)
        with pytest.raises(KeyboardInterrupt):
            prepare(str(data), vocab_size=400, cache_dir=tmp_path / "cache")
    tokenized, opened = [], []

    def counted(tokenizer: Any, texts: Iterator[str]) -> Iterator[Any]:
        for item in encode_documents(tokenizer, texts):
            tokenized.append(item)
            yield item

    def named(path: Path, *arguments: Any) -> Iterator[str]:
        opened.append(path.name)
        return read_file(path, *arguments)

    encode_documents, read_file = text_packing.encode_documents, text_stream.read_file
    monkeypatch.setattr(text_packing, "encode_documents", counted)
    monkeypatch.setattr(text_stream, "read_file", named)
    monkeypatch.setattr(preparation, "train_tokenizer", None)  # it has been trained
    corpus = prepare(str(data), vocab_size=400, cache_dir=tmp_path / "cache")
    assert contents(corpus.folder) == expected
    assert len(tokenized) == 300 - after
    assert opened == ["0.jsonl", "1.jsonl.gz", "2.jsonl"][after // 100 :]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [corpus.folder.name]


@pytest.mark.parametrize("after", [3, 10, 25])
def test_continued_division_of_each_document_is_bitwise_identical(tmp_path, monkeypatch, after: int) -> None:
    """Equal documents are divided, after an attempt to assign them as a whole."""
    path = tmp_path / "a.jsonl"
    path.write_text((json.dumps({"text": "the same again " * 9}) + "\n") * 10)
    expected = contents(prepare(str(path), vocab_size=300, cache_dir=tmp_path / "expected").folder)
    with monkeypatch.context() as interrupted:
        interrupt(interrupted, after)
        with pytest.raises(KeyboardInterrupt):
            prepare(str(path), vocab_size=300, cache_dir=tmp_path / "cache")
    assert contents(prepare(str(path), vocab_size=300, cache_dir=tmp_path / "cache").folder) == expected


@pytest.mark.parametrize("content", [b"", b"[", b"[{}]", b'[{"split": "other"}]'])
def test_damaged_progress_starts_anew(data, tmp_path, monkeypatch, content: bytes) -> None:
    expected = contents(prepare(str(data), vocab_size=400, cache_dir=tmp_path / "expected").folder)
    with monkeypatch.context() as interrupted:
        interrupt(interrupted, 50)
        with pytest.raises(KeyboardInterrupt):
            prepare(str(data), vocab_size=400, cache_dir=tmp_path / "cache")
    (progress,) = (tmp_path / "cache").glob(f".*.partial/{text_packing.PROGRESS}")
    progress.write_bytes(content)
    assert contents(prepare(str(data), vocab_size=400, cache_dir=tmp_path / "cache").folder) == expected


PREPARE = """
import sys
from fira.data import text_packing
from fira.data.corpus import prepare
text_packing.SAVED_EVERY_S = 0.01
print(prepare(sys.argv[1], vocab_size=400, cache_dir=sys.argv[2]).folder)
"""


@pytest.mark.slow
def test_killed_process_is_continued(tmp_path) -> None:
    rows = "".join(json.dumps({"text": text * 20}) + "\n" for text in STORIES * 40)
    (tmp_path / "a.jsonl").write_text(rows)
    command = [sys.executable, "-c", PREPARE, str(tmp_path / "a.jsonl")]
    killed = subprocess.Popen([*command, str(tmp_path / "cache")], cwd=ROOT)
    try:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("cache/.*.partial/progress.json")) and time.monotonic() < deadline:
            time.sleep(0.01)
        killed.send_signal(signal.SIGKILL)
        assert killed.wait(30) == -signal.SIGKILL
    finally:
        killed.kill()
    (progress,) = tmp_path.glob("cache/.*.partial/progress.json")
    assert 0 < json.loads(progress.read_text())[0]["documents"] < 12_000
    folders = []
    for name in ("cache", "expected"):
        arguments = [*command, str(tmp_path / name)]
        finished = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=100, check=True)
        folders.append(Path(finished.stdout.splitlines()[-1]))
    assert contents(folders[0]) == contents(folders[1])
