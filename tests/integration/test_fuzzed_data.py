"""Damaged data files: `prepare` reads what an independent reader reads, or refuses the file by name.

    documents  →  a valid file of a format  →  up to four random edits of its bytes  →  prepare
                                                                                     ↘  independent reader

Any exception other than UserError fails, a hang or a crash ends pytest, and memory is limited.
"""

import csv
import gzip
import io
import json
import logging
import re
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from fira.data import cache
from fira.data.corpus import Corpus, prepare
from fira.data.sources import documents
from fira.data.tokenizer import train_tokenizer
from fira.errors import UserError

VOCABULARY = 300
MEMORY = 400e6  # bytes by which the peak of the process may grow
SENTENCES = [f'Sentence {i}: the "quick" fox, n° {i}, ran\nover the hill, यह हिन्दी है।' for i in range(6)]


# Writers: documents → the bytes of a file


def write_text(texts: list[str]) -> bytes:
    return "\n".join(texts).encode("utf-8", "replace")


def write_utf16(texts: list[str]) -> bytes:
    return "\n".join(texts).encode("utf-16", "replace")


def write_gzip(texts: list[str]) -> bytes:
    return gzip.compress(write_text(texts), mtime=0)


def write_csv(texts: list[str]) -> bytes:
    file = io.StringIO(newline="")
    csv.writer(file).writerows([["id", "text"], *enumerate(texts)])
    return file.getvalue().encode("utf-8", "replace")


def write_jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)).encode()


def table(texts: list[str]) -> pa.Table:
    return pa.table({"id": range(len(texts)), "text": [text.encode("utf-8", "replace").decode() for text in texts]})


def write_parquet(texts: list[str]) -> bytes:
    file = io.BytesIO()
    pq.write_table(table(texts), file, row_group_size=3)
    return file.getvalue()


def write_arrow(texts: list[str]) -> bytes:
    file = io.BytesIO()
    with pa.ipc.new_stream(file, table(texts).schema) as writer:
        writer.write_table(table(texts), max_chunksize=3)
    return file.getvalue()


# Readers that are independent of fira.data: the bytes of a file → its documents, blank ones included


def decode(content: bytes) -> str:
    marks = {b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
    return content.decode(next((marks[mark] for mark in marks if content.startswith(mark)), "utf-8-sig"))


def read_text(content: bytes) -> list[str]:
    return [re.sub("\r\n?", "\n", decode(content))]


def read_gzip(content: bytes) -> list[str]:
    return read_text(gzip.decompress(content))


def read_csv(content: bytes) -> list[str]:
    header, *rows = csv.reader(io.StringIO(decode(content), newline=""), strict=True)
    (column,) = [i for i, name in enumerate(header) if name == "text"]
    return [row[column] for row in rows if len(row) > column]


def read_jsonl(content: bytes) -> list[str]:
    lines = (line for line in re.split("\r\n?|\n", decode(content)) if line.strip())
    texts = [json.loads(line)["text"] or "" for line in lines]
    return [re.sub("[\ud800-\udfff]", "?", text) for text in texts]


def read_parquet(content: bytes) -> list[str]:
    return [text or "" for text in pq.read_table(io.BytesIO(content), columns=["text"])["text"].to_pylist()]


def read_arrow(content: bytes) -> list[str]:
    return [text or "" for text in pa.ipc.open_stream(content).read_all()["text"].to_pylist()]


class Format(NamedTuple):
    name: str
    write: Callable[[list[str]], bytes]
    read: Callable[[bytes], list[str]]


FORMATS = [
    Format("a.txt", write_text, read_text),
    Format("wide.txt", write_utf16, read_text),
    Format("a.txt.gz", write_gzip, read_gzip),
    Format("a.csv", write_csv, read_csv),
    Format("A.CSV", write_csv, read_csv),
    Format("a.jsonl", write_jsonl, read_jsonl),
    Format("a.parquet", write_parquet, read_parquet),
    Format("a.arrow", write_arrow, read_arrow),
]

Edit = tuple[str, int, bytes]
EDITS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "overwrite", "insert", "delete", "truncate", "repeat"]),
        st.integers(0, 2**16),
        st.one_of(
            st.binary(min_size=1, max_size=8), st.sampled_from([b"\0" * 8, b"\xff" * 8, b'"', b"\n", b",", b"[{"])
        ),
    ),
    max_size=4,
)
TEXTS = st.lists(st.text(max_size=30), max_size=4)


def damage(content: bytes, edits: list[Edit]) -> bytes:
    for kind, number, piece in edits:
        at = number % (len(content) + 1)
        before, after = content[:at], content[at:]
        if kind == "flip":
            content = before + bytes(byte ^ (1 << piece[0] % 8) for byte in after[:1]) + after[1:]
        elif kind == "overwrite":
            content = before + piece + after[len(piece) :]
        elif kind == "insert":
            content = before + piece + after
        elif kind == "delete":
            content = before + after[piece[0] :]
        elif kind == "truncate":
            content = before
        else:
            content = before + after[: piece[0]] * 2 + after[piece[0] :]
    return content


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def tokenizer(folder) -> Path:
    path = folder / "tokenizer.json"
    train_tokenizer(SENTENCES, VOCABULARY).save(str(path))
    return path


@pytest.fixture(autouse=True)
def environment(folder, monkeypatch):
    """Write below the temporary folder only and do not wait for the disk. Fails if memory is not bounded."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(cache, "sync", lambda path: None)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before < MEMORY


def prepared(data: Path, tokenizer: Path, damaged: Path) -> Corpus | None:
    """The corpus, or None if it is refused in one line that names the damaged file."""
    shutil.rmtree("cache", ignore_errors=True)
    try:
        return prepare(str(data), "text", tokenizer, VOCABULARY, "cache", progress=False)
    except UserError as refused:
        message = str(refused)
    assert "\n" not in message
    assert damaged.name in message or "tokenizer" in message
    return None


def check_documents(corpus: Corpus, expected: list[str], tokenizer: Path) -> None:
    """Check counts and tokens; a document may be divided between the two splits."""
    encoder = Tokenizer.from_file(str(tokenizer))
    assert corpus.summary["documents"] == len(expected)
    assert corpus.summary["bytes"] == sum(len(text.encode()) for text in expected)
    end = encoder.token_to_id("</s>")
    ids = [token for text in expected for token in encoder.encode(text, add_special_tokens=False).ids if token != end]
    tokens = np.concatenate([split.read(0, len(split)) for split in (corpus.sources[0].train, corpus.sources[0].val)])
    np.testing.assert_array_equal(np.sort(tokens[tokens != end]), np.sort(ids))


def check_file(format: Format, texts: list[str], edits: list[Edit], tokenizer: Path) -> None:
    content = format.write(SENTENCES + texts)
    damaged = damage(content, edits)
    path = Path(format.name)
    path.write_bytes(damaged)
    corpus = prepared(path, tokenizer, path)
    if corpus:
        expected = [text for text in format.read(damaged) if text and not text.isspace()]
        assert list(documents(format.name, "text")) == expected
        check_documents(corpus, expected, tokenizer)
    else:
        assert damaged != content or "\0" in "".join(texts)


def check_folder(content: bytes, edits: list[Edit], tokenizer: Path, caplog) -> None:
    """A folder with a damaged text: it is read, refused by name, or skipped with a line in the log."""
    folder = Path("texts")
    folder.mkdir(exist_ok=True)
    (folder / "a.txt").write_text("".join(SENTENCES))
    (folder / "other").write_bytes(damage(content, edits))
    caplog.clear()
    if corpus := prepared(folder, tokenizer, folder / "other"):
        skipped = [record for record in caplog.records if "other" in record.getMessage()]
        expected = ["".join(SENTENCES)] + ([] if skipped else read_text((folder / "other").read_bytes()))
        check_documents(corpus, [text for text in expected if text and not text.isspace()], tokenizer)


def check_shards(edits: list[Edit], tokenizer: Path) -> None:
    folder = Path("shards")
    folder.mkdir(exist_ok=True)
    tokens = np.arange(200, dtype=np.uint16)
    np.save(folder / "x_val_1.npy", tokens)
    np.save(folder / "x_train_1.npy", tokens)
    path = folder / "x_train_1.npy"
    content = path.read_bytes()
    path.write_bytes(damage(content, edits))
    if corpus := prepared(folder, tokenizer, path):
        train = corpus.sources[0].train
        np.testing.assert_array_equal(train.read(0, len(train)), np.load(path))
        assert train.read(0, len(train)).max() < VOCABULARY
    else:
        assert path.read_bytes() != content


def check_tokenizer(edits: list[Edit], tokenizer: Path) -> None:
    path = Path("tokenizer_damaged.json")
    path.write_bytes(damage(tokenizer.read_bytes(), edits))
    Path("fixed.txt").write_text("\n".join(SENTENCES))
    if corpus := prepared(Path("fixed.txt"), path, path):
        check_documents(corpus, ["\n".join(SENTENCES)], path)


def fuzz(examples: int, check: Callable[[list[str], list[Edit]], None]) -> None:
    """Call `check` with random texts and edits; the first call has none."""
    check([], [])
    repeat = settings(max_examples=examples, deadline=None, derandomize=True, database=None)
    settings(repeat, suppress_health_check=list(HealthCheck))(given(TEXTS, EDITS)(check))()


AMOUNT = [12, pytest.param(110, marks=pytest.mark.slow)]


@pytest.mark.parametrize("examples", AMOUNT)
@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
def test_damaged_file_is_read_as_elsewhere_or_refused(format: Format, examples: int, tokenizer) -> None:
    fuzz(examples, lambda texts, edits: check_file(format, texts, edits, tokenizer))


@pytest.mark.parametrize("examples", AMOUNT)
def test_no_text_of_a_folder_is_lost_silently(examples: int, tokenizer, caplog) -> None:
    caplog.set_level(logging.INFO)
    writers = [write_text, write_utf16, lambda texts: "".join(texts).encode("latin-1", "ignore"), write_gzip]
    fuzz(
        examples,
        lambda texts, edits: check_folder(
            writers[len("".join(texts)) % len(writers)](SENTENCES + texts), edits, tokenizer, caplog
        ),
    )


@pytest.mark.parametrize("examples", AMOUNT)
def test_damaged_shard_is_read_as_by_numpy_or_refused(examples: int, tokenizer) -> None:
    fuzz(examples, lambda texts, edits: check_shards(edits, tokenizer))


@pytest.mark.parametrize("examples", AMOUNT)
def test_damaged_tokenizer_encodes_as_the_library_or_is_refused(examples: int, tokenizer) -> None:
    fuzz(examples, lambda texts, edits: check_tokenizer(edits, tokenizer))
