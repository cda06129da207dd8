import csv
import json
import logging
import os
import socket
import sys
import types
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fira.data.readers import MAX_LENGTH
from fira.data.sources import documents, input_files
from fira.errors import UserError

TEXTS = ["first\nwith two lines", 'second, with "quotes"', "तीसरा"]
ROWS = [{"id": str(i), "Text": text} for i, text in enumerate(TEXTS)]


def write(path: Path, rows: list[dict]) -> str:
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8")
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, pa.Table.from_pylist(rows).schema) as stream:
            stream.write_table(pa.Table.from_pylist(rows))
    return str(path)


def error(data: str | None, column: str = "Text") -> str:
    with pytest.raises(UserError) as caught:
        list(documents(data, column))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet", ".arrow"])
def test_table_yields_its_text_column(tmp_path, suffix: str) -> None:
    data = write(tmp_path / f"t{suffix}", [*ROWS[:2], {"id": "x", "Text": " "}, ROWS[2]])
    assert list(documents(data, "Text")) == TEXTS  # the blank row is skipped


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet", ".arrow"])
def test_missing_column_error_lists_the_columns(tmp_path, suffix: str) -> None:
    message = error(write(tmp_path / f"t{suffix}", ROWS), "body")
    assert f"t{suffix}" in message
    assert "'body'" in message
    assert "'id', 'Text'" in message


def test_text_file_is_split_at_blank_lines_without_loss(tmp_path) -> None:
    text = "".join(f"paragraph {i} " + "word " * 200 + "\n\n" for i in range(100))
    (tmp_path / "book.txt").write_text(text)
    parts = list(documents(str(tmp_path / "book.txt"), ""))
    assert "".join(parts) == text
    assert 3 < len(parts) < 10
    assert all(part.endswith("\n\n") for part in parts)


def test_long_line_is_split_inside(tmp_path) -> None:
    (tmp_path / "line.txt").write_text("é" * 500_000)
    parts = list(documents(str(tmp_path / "line.txt"), ""))
    assert "".join(parts) == "é" * 500_000
    assert max(map(len, parts)) <= 2 * MAX_LENGTH


def test_folder_yields_its_visible_text_files_of_any_format_sorted(tmp_path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("hidden")
    (tmp_path / "b" / "z.txt").write_text("last")
    (tmp_path / "a.md").write_text("\ufefffirst", encoding="utf-8")
    (tmp_path / "b" / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\x00\x00")
    write(tmp_path / "b" / "t.csv", ROWS)
    assert list(documents(str(tmp_path), "Text")) == ["first", *TEXTS, "last"]


@pytest.mark.parametrize("suffix", [".TXT", ".CSV", ".JSONL", ".Parquet", ".ARROW"])
def test_upper_case_suffix_selects_the_same_reader(tmp_path, suffix: str) -> None:
    lower = tmp_path / f"t{suffix.lower()}"
    if suffix == ".TXT":
        lower.write_text("\n\n".join(TEXTS))
    else:
        write(lower, ROWS)
    expected = list(documents(str(lower), "Text"))
    lower.rename(tmp_path / f"t{suffix}")
    assert list(documents(str(tmp_path / f"t{suffix}"), "Text")) == list(documents(str(tmp_path), "Text")) == expected


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32", "utf-8-sig"])
@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.jsonl"])
def test_byte_order_mark_selects_the_encoding(tmp_path, name: str, encoding: str) -> None:
    rows = {"a.txt": "तीसरा é", "a.csv": 'Text\r\n"तीसरा é"\r\n', "a.jsonl": '{"Text": "तीसरा é"}\n'}[name]
    mark = "\ufeff" if encoding == "utf-16-be" else ""  # the other codecs write it themselves
    (tmp_path / name).write_bytes((mark + rows).encode(encoding))
    assert list(documents(str(tmp_path), "Text")) == ["तीसरा é"]


def test_text_in_another_encoding_in_a_folder_is_refused_with_the_names(tmp_path) -> None:
    (tmp_path / "good.txt").write_text("fine")
    for name in "abcde":
        (tmp_path / f"{name}.txt").write_bytes("crème brûlée".encode("latin-1"))
    message = error(str(tmp_path))
    assert "5 files: a.txt, b.txt, c.txt, …" in message
    assert "UTF-8" in message
    assert "iconv" in message


def test_skipped_entries_of_a_folder_are_logged(tmp_path, caplog) -> None:
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\x00\x00")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "broken").symlink_to(tmp_path / "missing")
    (tmp_path / "folder").symlink_to(tmp_path)
    with caplog.at_level(logging.INFO), socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        assert list(documents(str(tmp_path), "")) == ["first"]
    (record,) = caplog.records
    assert "5 files: broken, folder, picture.png, …" in record.getMessage()


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ["pipe", "pipe.csv", "pipe.parquet"])
def test_pipe_and_device_are_refused_without_waiting(tmp_path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    assert f"{name}: not a regular file" in error(str(tmp_path / name))
    (tmp_path / "only").mkdir()
    os.mkfifo(tmp_path / "only" / name)
    assert "no text in this folder" in error(str(tmp_path / "only"))
    assert "not a regular file" in error("/dev/zero")


def test_default_is_the_standard_library_without_its_tests() -> None:
    files = input_files(None)
    assert "argparse.py" in {file.name for file in files}
    assert not any({"site-packages", "test", "tests"} & set(file.parts) for file in files)
    topics = [file for file in files if file.parts[-2:] == ("pydoc_data", "topics.py")]
    reference = list(documents(str(topics[0]), ""))
    assert any(text.startswith('The "assert" statement') for text in reference)
    assert len(reference) > 50


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("empty.txt", b"", "no text"),
        ("blank.txt", b" \n\n ", "no text"),
        ("binary.txt", b"MZ\x00\x01", "binary"),
        ("utf16.txt", "text".encode("utf-16-le"), "line 1: contains zero bytes"),
        ("utf16.csv", "Text\na\n".encode("utf-16-be"), "line 1: contains zero bytes"),
        ("zero.csv", b"Text\na\nb\0\n", "line 3: contains zero bytes"),
        ("latin.txt", b"caf\xe9 cr\xe8me", "line 1: byte 0xe9 is not UTF-8"),
        ("late.txt", b"a line\n" * 9999 + b"caf\xe9 \n", "line 10000: byte 0xe9 is not UTF-8"),
        ("cut.txt", "a\nä".encode()[:-1], "line 2: byte 0xc3 is not UTF-8"),
        ("odd.txt", ("b\n" * 5000).encode("utf-16") + b"c", "line 5001: byte 0x63 is not UTF-16"),
        ("t.jsonl", b'{"Text": "a"}\n{"Text": \n', "line 2: invalid JSON"),
        ("t.jsonl", b'["Text"]\n', "line 1: not a JSON object"),
        ("t.jsonl", b'{"Text": 3}\n', "holds int"),
        ("t.parquet", b"PAR1 and no more", "not a valid Parquet file"),
        ("t.csv", b"Text\nHello, world\n", "near line 2: invalid CSV (more fields than columns"),
        ("t.csv", b"", "t.csv: empty; give a file whose first line has the names of the columns"),
        ("t.csv", b"other\na\n", "no column 'Text'; name one with --text-column: 'other'"),
        ("t.csv", b"TEXT,text\na,b\n", "no column 'Text'; name one with --text-column: 'TEXT', 'text'"),
    ],
)
def test_invalid_file_raises_one_line_error(tmp_path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    message = error(str(tmp_path / name))
    assert name in message
    assert reason in message


def test_damaged_parquet_file_is_named(tmp_path) -> None:
    path = Path(write(tmp_path / "t.parquet", ROWS * 500))
    content = bytearray(path.read_bytes())
    content[4:200] = bytes(196)
    path.write_bytes(content)
    assert "t.parquet: not a valid Parquet file" in error(str(path))


def test_column_of_numbers_raises(tmp_path) -> None:
    assert "holds int64" in error(write(tmp_path / "t.parquet", [{"Text": 3}]))


def test_folder_without_text_and_missing_path_raise(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "no text" in error(str(tmp_path))
    assert "no such file or folder" in error(str(tmp_path / "nothing.txt"))
    assert "pip install datasets" in error("someone/something")


def test_unpaired_surrogate_in_json_is_replaced(tmp_path) -> None:
    (tmp_path / "t.jsonl").write_text('{"Text": "a\\ud800b"}\n')
    assert list(documents(str(tmp_path / "t.jsonl"), "Text")) == ["a?b"]


def test_hugging_face_dataset_is_read_from_its_arrow_files(tmp_path, monkeypatch) -> None:
    path = write(tmp_path / "shard.arrow", ROWS)

    def load_dataset(name: str, split: str) -> object:
        if name != "org/name":
            raise FileNotFoundError("Dataset 'org/other' doesn't exist\non the Hub")
        return types.SimpleNamespace(cache_files=[{"filename": path}])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert list(documents("org/name", "Text")) == TEXTS
    assert "Dataset 'org/other' doesn't exist" in error("org/other")
