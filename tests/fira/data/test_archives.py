"""Tar archives as the standard library and the program tar write them."""

import gzip
import io
import json
import logging
import subprocess
import tarfile
from pathlib import Path

import pytest

from fira.data.sources import documents
from fira.errors import UserError
from tests.fira.data.test_compression import zstd

TEXTS = [f"text {i} é " + "word " * 300 * i for i in range(5)]


def archive(members: dict[str, bytes], format: int = tarfile.PAX_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


PLAIN = archive({f"folder/{i}.txt": text.encode() for i, text in enumerate(TEXTS)})


def read(path: Path, content: bytes) -> list[str]:
    path.write_bytes(content)
    return list(documents(str(path), "text"))


def error(path: Path, content: bytes) -> str:
    with pytest.raises(UserError) as caught:
        read(path, content)
    assert "\n" not in str(caught.value)
    assert path.name in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_texts_are_read_in_the_order_of_the_archive(tmp_path, format: int) -> None:
    members = {f"{'long/' * 15}{5 - i}.txt": text.encode() for i, text in enumerate(TEXTS)}
    assert read(tmp_path / "a.tar", archive(members, format)) == TEXTS


@pytest.mark.parametrize("name", ["a.tar.gz", "a.TGZ", "a.tar.zst"])
def test_compressed_archive(tmp_path, name: str) -> None:
    assert read(tmp_path / name, (zstd if name.endswith("zst") else gzip.compress)(PLAIN)) == TEXTS


def test_archive_of_the_program_tar_equals_its_folder(tmp_path) -> None:
    (tmp_path / "texts" / "sub").mkdir(parents=True)
    for i, text in enumerate(TEXTS):
        (tmp_path / "texts" / ("sub" if i % 2 else ".") / f"{i}.txt").write_text(text)
    command = ["tar", "--create", "--gzip", "--file", "a.tar.gz", "--sort=name", "texts"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=30)
    found = list(documents(str(tmp_path / "a.tar.gz"), ""))
    assert sorted(found) == sorted(documents(str(tmp_path / "texts"), "")) == sorted(TEXTS)


def test_tables_compressed_members_and_what_is_skipped(tmp_path, caplog) -> None:
    rows = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    members = {
        "a.jsonl": rows,
        "b.jsonl.gz": gzip.compress(rows, mtime=0),
        "c.csv": b"text\nfrom a table\n",
        "d.txt.zst": zstd(b"compressed"),
        ".hidden/e.txt": b"hidden",
        "./._f.txt": b"hidden",
        "g.png": b"\x89PNG\r\n\x1a\n\0\0",
    }
    with caplog.at_level(logging.WARNING):
        assert read(tmp_path / "a.tar", archive(members)) == [*TEXTS, *TEXTS, "from a table", "compressed"]
    (record,) = caplog.records
    assert "a.tar: skipped what is not text (1 file: g.png)" in record.getMessage()


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.parquet", b"PAR1", ".parquet files such as a.parquet cannot be read in an archive"),
        ("latin.txt", "crème brûlée".encode("latin-1"), "latin.txt is text, but not in UTF-8"),
        ("late.txt", b"a line\n" * 9999 + b"caf\xe9 \n", "late.txt: byte 0xe9 is not UTF-8"),
        ("a.jsonl", b'{"text": 3}', "a.jsonl, line 1: 'text' holds int"),
        ("a.txt.gz", gzip.compress(b"text", mtime=0)[:-2], "damaged or incomplete"),
    ],
)
def test_member_that_cannot_be_read_is_named(tmp_path, name: str, content: bytes, reason: str) -> None:
    assert reason in error(tmp_path / "x.tar", archive({"first.txt": b"first", name: content}))


def test_damaged_archive_is_refused(tmp_path) -> None:
    """Where a header is damaged or missing, tarfile ends without an error."""
    end = len(PLAIN.rstrip(b"\0")) // 512 * 512 + 512  # of the last member
    headers = [i for i in range(0, end, 512) if PLAIN[i : i + 7] == b"folder/"]
    assert len(headers) == 5
    damaged = {
        "cut before the end": PLAIN[:end],
        "cut in a text": PLAIN[: headers[-1] + 700],
        "cut before a header": PLAIN[: headers[3]],
        "cut in a header": PLAIN[: headers[3] + 100],
        "damaged header": PLAIN[: headers[3]] + b"X" + PLAIN[headers[3] + 1 :],
        "two archives": PLAIN + PLAIN,
        "empty": b"",
        "no archive": b"text\n" * 500,
    }
    for content in damaged.values():
        assert "not a complete tar archive" in error(tmp_path / "a.tar", content)
    assert "damaged or incomplete" in error(tmp_path / "a.tar.gz", gzip.compress(PLAIN, mtime=0)[:-4])
