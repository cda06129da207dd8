import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fira.data import readers
from fira.data.readers import END_OF_STREAM, read_file
from fira.errors import UserError

TEXTS = [f"document {i} " + "word " * (i % 50) for i in range(1000)]


def read(path: Path) -> list[str]:
    return list(read_file(path, "text", lambda _: None))


def error(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read(path)
    assert "\n" not in str(caught.value)
    assert path.name in str(caught.value)
    return str(caught.value)


def stream(table: pa.Table, rows: int) -> bytes:
    """An Arrow stream of batches of `rows` rows."""
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)
    return sink.getvalue()


TABLE = pa.table({"text": TEXTS, "number": range(1000)})


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.jsonl", "a.parquet", "a.arrow"])
def test_progress_adds_up_to_the_size_of_the_file(tmp_path, name: str) -> None:
    path = tmp_path / name
    if name == "a.txt":
        path.write_text("\n".join(TEXTS))
    elif name == "a.csv":
        path.write_text("number,text\n" + "".join(f'{i},"{text}"\n' for i, text in enumerate(TEXTS)))
    elif name == "a.jsonl":
        path.write_text("".join(json.dumps({"number": i, "text": text}) + "\n" for i, text in enumerate(TEXTS)))
    elif name == "a.parquet":
        pq.write_table(TABLE, path)
    else:
        path.write_bytes(stream(TABLE, 100))
    advances: list[int] = []
    assert "".join(read_file(path, "text", advances.append)).split() == " ".join(TEXTS).split()
    size = path.stat().st_size
    assert 0.95 * size <= sum(advances) <= size


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet", "a.arrow"])
def test_name_of_the_column_may_differ_in_case(tmp_path, name: str) -> None:
    path, table = tmp_path / name, TABLE.rename_columns(["Text", "number"])
    if name == "a.csv":
        path.write_text("Text\n" + "".join(f'"{text}"\n' for text in TEXTS))
    elif name == "a.jsonl":
        path.write_text("".join(json.dumps({"Text": text}) + "\n" for text in TEXTS))
    elif name == "a.parquet":
        pq.write_table(table, path)
    else:
        path.write_bytes(stream(table, 100))
    assert read(path) == TEXTS


def test_two_columns_of_the_same_name_are_refused(tmp_path) -> None:
    (tmp_path / "a.csv").write_text("text,id,text\nfirst,1,second\n")
    assert "2 columns are named 'text'" in error(tmp_path / "a.csv")
    table = pa.Table.from_arrays([pa.array(["first"]), pa.array(["second"])], ["text", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    assert "2 columns are named 'text'" in error(tmp_path / "a.parquet")
    (tmp_path / "a.arrow").write_bytes(stream(table, 10))
    assert "2 columns are named 'text'" in error(tmp_path / "a.arrow")


def test_csv_with_an_unclosed_quote_is_refused(tmp_path) -> None:
    (tmp_path / "a.csv").write_text('id,text\n1,first\n2,"second\n3,third\n')
    assert "near line 2: invalid CSV (unexpected end of data)" in error(tmp_path / "a.csv")


@pytest.mark.parametrize("content", ["[" * 100_000, '{"text": ' * 100_000, '{"text": ' + "9" * 5000 + "}"])
def test_json_that_the_parser_cannot_represent_is_refused(tmp_path, content: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    assert "line 1: invalid JSON" in error(tmp_path / "a.jsonl")


def test_length_of_a_line_is_limited(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(readers, "LIMIT", 1000)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x" * 900}) + "\n" + json.dumps({"text": "x" * 1000}))
    assert "line 2: longer than 1,000 characters" in error(tmp_path / "a.jsonl")
    (tmp_path / "a.csv").write_text("text\n" + "x" * 1001)
    assert "line 2: longer than 1,000 characters" in error(tmp_path / "a.csv")


def test_arrow_stream_that_ends_too_early_or_too_late_is_refused(tmp_path) -> None:
    """A reader of streams accepts the first two, and ignores the rest of the third."""
    complete = stream(TABLE, 100)
    ends = [i for i in range(0, len(complete), 8) if complete[i : i + 4] == b"\xff\xff\xff\xff"]  # of the messages
    path = tmp_path / "a.arrow"
    for content in (
        complete[: ends[-2]],
        complete[: ends[-1]],
        complete[: ends[5]] + END_OF_STREAM + complete[ends[5] :],
        complete + b"more",
    ):
        path.write_bytes(content)
        assert "not a valid Arrow stream (the stream does not end at the end of the file)" in error(path)
    path.write_bytes(complete)
    assert read(path) == TEXTS


def test_arrow_offsets_outside_the_text_are_refused(tmp_path) -> None:
    content = bytearray(stream(TABLE, 1000))
    offsets = b"".join(len("".join(TEXTS[:i])).to_bytes(4, "little") for i in range(4))
    start = content.index(offsets)
    for offset in (-1, 2**31 - 1, 1 << 20, 3):  # 3: inside the bounds, but the offsets decrease
        damaged = bytearray(content)
        damaged[start + 8 : start + 12] = offset.to_bytes(4, "little", signed=True)
        (tmp_path / "a.arrow").write_bytes(damaged)
        assert "not a valid Arrow stream" in error(tmp_path / "a.arrow")


def test_damaged_page_of_a_parquet_file_with_checksums_is_refused(tmp_path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(TABLE, path, write_page_checksum=True, compression="none", use_dictionary=False)
    content = bytearray(path.read_bytes())
    content[content.index(b"document 500")] ^= 1  # still valid text
    path.write_bytes(content)
    assert "not a valid Parquet file" in error(path)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_error_of_any_type_from_pyarrow_names_the_file(tmp_path, monkeypatch, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"damaged")

    def fail(*_args: object, **_kwargs: object) -> None:
        raise SystemError("returned NULL\nwithout setting an exception")

    monkeypatch.setattr(pq, "ParquetFile", fail)
    monkeypatch.setattr(pa.ipc, "open_stream", fail)
    assert "returned NULL without setting an exception" in error(path)


@pytest.mark.parametrize(
    ("name", "content", "documents"),
    [
        ("c4.json", '{"url": "x", "text": "one"}\n{"text": "two"}\n', ["one", "two"]),
        ("c4.ndjson", '{"text": "one"}\n', ["one"]),
        ("package.json", '{\n  "text": "one"\n}\n', ['{\n  "text": "one"\n}\n']),
        ("minified.json", '{"name":"one"}', ['{"name":"one"}']),
    ],
)
def test_json_lines_by_other_names(tmp_path, name: str, content: str, documents: list[str]) -> None:
    (tmp_path / name).write_text(content)
    assert list(read_file(tmp_path / name, "text", lambda _: None)) == documents


def test_categories_of_text_are_read(tmp_path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": pa.array(["one", "two", "one", None]).dictionary_encode()}), path)
    assert list(read_file(path, "text", lambda _: None)) == ["one", "two", "one", ""]
    pq.write_table(pa.table({"text": pa.array([1, 2]).dictionary_encode()}), path)
    with pytest.raises(UserError, match="not text"):
        list(read_file(path, "text", lambda _: None))
