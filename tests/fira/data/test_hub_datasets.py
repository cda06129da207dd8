"""Samples of datasets that are streamed. `datasets` itself reads local files in place of those of the Hub."""

from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fira.data import hub_datasets
from fira.data.hub_datasets import dataset_files
from fira.data.sources import documents
from fira.errors import UserError

TEXTS = [f"document {i}" for i in range(200)]


@pytest.fixture(autouse=True)
def calls(tmp_path, monkeypatch) -> list[tuple[str, dict[str, Any]]]:
    """The arguments with which datasets are loaded. Each one has four files of 50 documents."""
    for number in range(4):
        part = TEXTS[50 * number : 50 * number + 50]
        pq.write_table(pa.table({"text": part, "score": range(50)}), tmp_path / f"{number}.parquet")
    made: list[tuple[str, dict[str, Any]]] = []
    load = datasets.load_dataset

    def load_dataset(path: str, **options: Any) -> Any:
        made.append((path, options))
        if path == "org/missing":
            raise FileNotFoundError("no such dataset")
        files = sorted(map(str, tmp_path.glob("?.parquet")))
        return load("parquet", data_files=files, split="train", streaming=options.get("streaming", False))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(hub_datasets, "BUFFER", 20)
    monkeypatch.setenv("FIRA_CACHE", str(tmp_path / "cache"))
    return made


def test_sample_is_drawn_from_shuffled_files_and_kept(tmp_path, calls) -> None:
    sample = list(documents("org/name:config[:60]", "text"))
    assert len(set(sample)) == 60
    assert set(sample) < set(TEXTS)
    assert sample != sorted(sample, key=TEXTS.index)
    assert calls == [("org/name", {"split": "train", "name": "config", "streaming": True})]
    assert list(documents("org/name:config[:60]", "text")) == sample
    assert len(calls) == 1
    stream = datasets.load_dataset("x", streaming=True).shuffle(seed=42, buffer_size=20).take(60)
    assert [row["text"] for row in stream] == sample


def test_larger_sample_than_the_dataset_is_the_whole_dataset(calls) -> None:
    assert sorted(documents("org/name[:999]", "text")) == sorted(TEXTS)


def test_interrupted_sample_is_not_used(tmp_path, monkeypatch) -> None:
    with monkeypatch.context() as interrupted:

        def write(self: Any, table: Any) -> None:
            raise ConnectionError("the network\nis down")

        interrupted.setattr(pq.ParquetWriter, "write_table", write)
        with pytest.raises(UserError, match=r"org/name\[:10\]: the stream ended early \(the network is down\)"):
            dataset_files("org/name[:10]")
    assert len(list(documents("org/name[:10]", "text"))) == 10


@pytest.mark.parametrize("name", ["org/missing[:10]", "org/missing"])
def test_missing_dataset_is_named(name: str) -> None:
    with pytest.raises(UserError, match=r"org/missing.*no Hugging Face dataset"):
        dataset_files(name)


@pytest.mark.parametrize("name", ["a b", "texts/a.txt", "a/b/c", "org/name[10]", "missing.tar.gz", "missing.jsonl.zst"])
def test_path_of_a_missing_file_is_not_taken_for_a_dataset(name: str, calls) -> None:
    with pytest.raises(UserError, match="no such file or folder; check the path"):
        dataset_files(name)
    assert not calls


def test_rows_of_a_sample_keep_their_columns(calls) -> None:
    (path,) = dataset_files("org/name[:30]")
    table = pq.read_table(Path(path))
    assert table.column_names == ["text", "score"]
    assert table["score"].to_pylist() == [TEXTS.index(text) % 50 for text in table["text"].to_pylist()]
