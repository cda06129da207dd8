"""Compressed files as gzip, zstd and pyarrow write them, the last as an independent writer of many frames."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from fira.data.cache import content_key
from fira.data.compression import compression_of, format_of, open_bytes, suffix_of
from fira.data.sources import documents, input_files
from fira.errors import UserError

TEXTS = [f"document {i}: " + "é word " * (i % 50) for i in range(1000)]
JSONL = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
# "first é " and "second\n", each in a file of its own, which are concatenated: gzip 1.12, and zstd 1.5.4 with --check.
GZIP = bytes.fromhex(
    "1f8b08000000000000034bcb2c2a2e5138bc5201003d0fb78b090000001f8b08000000000000032b4e4dcecf4be102007ec00f0607000000"
)
ZSTD = bytes.fromhex(
    "28b52ffd2409490000666972737420c3a92056255068"  # a line per frame
    "28b52ffd24073900007365636f6e640a16404c55"
)


def zstd(content: bytes, frames: int = 1) -> bytes:
    """Compress in some frames, as parallel programs do."""
    size = -(-len(content) // frames)
    parts = [content[start : start + size] for start in range(0, len(content), size)]
    return b"".join(pa.Codec("zstd").compress(part, asbytes=True) for part in parts)


WRITERS: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".zst": zstd}


@pytest.mark.parametrize(
    ("name", "suffix", "format", "compression"),
    [
        ("a.txt", ".txt", ".txt", ""),
        ("a.JSONL.GZ", ".jsonl.gz", ".jsonl", ".gz"),
        ("c4-train.00000-of-01024.json.gz", ".json.gz", ".jsonl", ".gz"),
        ("config.json", ".json", ".json", ""),
        ("v1.2.csv.zst", ".csv.zst", ".csv", ".zst"),
        ("texts.tgz", ".tar.gz", ".tar", ".gz"),
        ("texts.tar.zst", ".tar.zst", ".tar", ".zst"),
        ("notes.gz", ".gz", "", ".gz"),
        ("README", "", "", ""),
    ],
)
def test_suffix_selects_reader_and_decompression(name: str, suffix: str, format: str, compression: str) -> None:
    assert (suffix_of(Path(name)), format_of(Path(name)), compression_of(Path(name))) == (suffix, format, compression)


@pytest.mark.parametrize(("suffix", "content"), [(".gz", GZIP), (".zst", ZSTD)])
def test_files_of_the_programs_are_read_with_all_their_frames(tmp_path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(content)
    assert list(documents(str(path), "")) == ["first é second\n"]
    path.write_bytes(content[:-3])
    with pytest.raises(UserError, match=rf"a\.txt\{suffix}: damaged or incomplete \(.*\); download it again"):
        list(documents(str(path), ""))


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_compressed_table_has_the_documents_of_the_table(tmp_path, name: str, suffix: str) -> None:
    rows = "text\n" + "".join(f'"{text}"\n' for text in TEXTS) if name == "a.csv" else JSONL.decode()
    (tmp_path / f"{name}{suffix}").write_bytes(WRITERS[suffix](rows.encode()))
    assert list(documents(str(tmp_path), "text")) == TEXTS


def test_many_frames_are_one_file(tmp_path) -> None:
    (tmp_path / "a.jsonl.zst").write_bytes(zstd(JSONL, frames=500))
    assert list(documents(str(tmp_path / "a.jsonl.zst"), "text")) == TEXTS


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("cut", [1, 4, 9, 100])
def test_truncated_or_extended_file_is_refused(tmp_path, suffix: str, cut: int) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    compressed = WRITERS[suffix](JSONL)
    for content in (compressed[:-cut], compressed + b"x" * cut):
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"a\.jsonl\{suffix}.*damaged or incomplete"):
            list(documents(str(path), "text"))


def test_byte_that_is_not_utf8_is_reported_with_its_line(tmp_path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"a line\n" * 9999 + b"caf\xe9 \n"))
    with pytest.raises(UserError, match=r"a\.txt\.gz, line 10000: byte 0xe9 is not UTF-8"):
        list(documents(str(tmp_path / "a.txt.gz"), ""))


def test_compressed_file_that_is_not_text_is_skipped_in_a_folder(tmp_path, caplog) -> None:
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "b.gz").write_bytes(gzip.compress(bytes(range(256))))
    assert list(documents(str(tmp_path), "")) == ["first"]
    (record,) = caplog.records
    assert "1 file: b.gz" in record.getMessage()


def test_parquet_in_a_compressed_file_is_refused(tmp_path) -> None:
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress(b"PAR1"))
    with pytest.raises(UserError, match=r"a\.parquet\.gz: .*decompress the file"):
        list(documents(str(tmp_path / "a.parquet.gz"), "text"))


def test_progress_counts_the_bytes_of_the_compressed_file(tmp_path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(JSONL))
    advances: list[int] = []
    with open_bytes(path, advances.append) as file:
        assert file.read() == JSONL
    assert sum(advances) == path.stat().st_size


def test_inner_suffix_is_part_of_the_cache_key(tmp_path) -> None:
    for name in ("a.txt.gz", "a.jsonl.gz"):
        (tmp_path / name).write_bytes(gzip.compress(JSONL, mtime=0))
    keys = {content_key(tmp_path, input_files(str(path)), [], False) for path in tmp_path.glob("*.gz")}
    assert len(keys) == 2
