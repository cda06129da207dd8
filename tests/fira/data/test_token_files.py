"""Files of token ids against the programs that write them.

The files in tests/fixtures/token_files were written by megatron-core 0.16.1 (IndexedDatasetBuilder; with
MegatronTokenizedFile, datatrove 0.10.1 writes the same bytes) and by datatrove (TokenizedFile), from the documents of
`documents`. In megatron_int32, a document of more than one token has two sequences.
"""

import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.lib import format as npy

from fira.data.document_index import DocumentIndex, index_of, open_index
from fira.data.token_files import map_tokens
from fira.errors import UserError
from tests.launch import ROOT

FIXTURES = ROOT / "tests" / "fixtures" / "token_files"
MEGATRON = ["megatron_text_document.bin", "megatron_int32_text_document.bin"]
DATATROVE = ["datatrove_2.ds", "datatrove_4.ds"]
INDEXED = MEGATRON + DATATROVE


def documents() -> list[list[int]]:
    """Document i has 2 i + 1 tokens, of which the last one is the end-of-document token of GPT-2."""
    return [[(7 * i + 3 * j) % 50_000 for j in range(2 * i)] + [50_256] for i in range(12)]


@pytest.fixture
def files(tmp_path) -> Path:
    """A copy of the fixtures."""
    return shutil.copytree(FIXTURES, tmp_path / "files")


def index(path: Path) -> DocumentIndex:
    found = index_of(path)
    assert found
    return open_index(path, found)


@pytest.mark.parametrize("name", INDEXED)
def test_indexed_file_has_the_tokens_and_documents_that_were_written(name: str) -> None:
    path, expected = FIXTURES / name, documents()
    assert map_tokens(path).tolist() == [token for document in expected for token in document]
    assert map_tokens(path).dtype.itemsize == (4 if name in (MEGATRON[1], DATATROVE[1]) else 2)
    index(path).check()
    starts = np.cumsum([0, *map(len, expected)])
    for token in range(starts[-1]):
        assert index(path).next_document(token) == starts[starts >= token][0], token


def llm_c(path: Path, tokens: np.ndarray, magic: int = 20240520, version: int = 1) -> None:
    """Write a file as dev/data/data_common.py of llm.c and data/fineweb.py of modded-nanogpt do."""
    header = np.zeros(256, np.int32)
    header[:3] = magic, version, len(tokens)
    path.write_bytes(header.tobytes() + tokens.tobytes())


@pytest.mark.parametrize(("magic", "version", "dtype"), [(20240520, 1, np.uint16), (20240801, 7, np.uint32)])
def test_shard_of_llm_c_and_modded_nanogpt(tmp_path, magic: int, version: int, dtype: type) -> None:
    tokens = np.arange(2**16 - 1000, 2**16).astype(dtype)
    llm_c(tmp_path / "x.bin", tokens, magic, version)
    np.testing.assert_array_equal(map_tokens(tmp_path / "x.bin"), tokens)


CUTS: list[Callable[[bytes], bytes]] = [lambda raw: raw[:-1], lambda raw: raw + b"\0\0", lambda raw: raw[:900]]


@pytest.mark.parametrize("change", CUTS)
def test_shard_of_llm_c_with_another_size_is_refused(tmp_path, change: Callable[[bytes], bytes]) -> None:
    llm_c(tmp_path / "x.bin", np.arange(100).astype(np.uint16))
    (tmp_path / "x.bin").write_bytes(change((tmp_path / "x.bin").read_bytes()))
    with pytest.raises(UserError, match=r"x\.bin: \d+ bytes instead of 1224, incomplete"):
        map_tokens(tmp_path / "x.bin")


@pytest.mark.parametrize(("magic", "version"), [(20240520, 2), (20240801, 1), (0, 0)])
def test_file_without_a_header_of_llm_c_is_refused_with_the_remedy(tmp_path, magic: int, version: int) -> None:
    llm_c(tmp_path / "train.bin", np.arange(100).astype(np.uint16), magic, version)
    with pytest.raises(UserError, match=r"train\.bin: no header of llm\.c, .*np\.save"):
        map_tokens(tmp_path / "train.bin")


CHANGES: list[Callable[[bytes], bytes]] = [lambda raw: raw[:-8], lambda raw: raw + bytes(8), lambda raw: raw[:20]]


@pytest.mark.parametrize("name", INDEXED)
@pytest.mark.parametrize("part", ["tokens", "index"])
@pytest.mark.parametrize("change", [*CHANGES, lambda _: b""])
def test_incomplete_indexed_file_is_named(files, name: str, part: str, change: Callable[[bytes], bytes]) -> None:
    path = files / name if part == "tokens" else index_of(files / name)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match=r"(megatron|datatrove).*(copy|replace)"):
        index(files / name).check()


@pytest.mark.parametrize("name", MEGATRON)
@pytest.mark.parametrize(
    ("at", "content", "message"),
    [
        (0, b"TNTIDX", "not an index of Megatron-LM"),
        (9, b"\2", "not an index of Megatron-LM"),
        (17, b"\6", "not an index of Megatron-LM"),  # float64
        (18, b"\1", "instead of"),  # the number of sequences
        (34, b"\2", "does not describe the whole file"),  # a length
    ],
)
def test_damaged_index_of_megatron_is_refused(files, name: str, at: int, content: bytes, message: str) -> None:
    path = index_of(files / name)
    raw = bytearray(path.read_bytes())
    raw[at : at + len(content)] = content
    path.write_bytes(raw)
    with pytest.raises(UserError, match=message):
        index(files / name).check()


@pytest.mark.parametrize("name", DATATROVE)
def test_ends_of_documents_that_decrease_are_refused(files, name: str) -> None:
    path = files / f"{name}.index"
    raw = bytearray(path.read_bytes())
    struct.pack_into("<Q", raw, 8, 143)
    path.write_bytes(raw)
    with pytest.raises(UserError, match="does not describe the whole file"):
        index(files / name).check()


def test_tokens_of_datatrove_without_their_index_are_refused(files) -> None:
    (files / "datatrove_2.ds.index").unlink()
    with pytest.raises(UserError, match=r"datatrove_2\.ds: no datatrove_2\.ds\.index"):
        map_tokens(files / "datatrove_2.ds")


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"raw tokens", None])
def test_incomplete_npy_file_is_named(tmp_path, content: bytes | None) -> None:
    path = tmp_path / "edufineweb_train_000001.npy"
    np.save(path, np.arange(1000, dtype=np.uint16))
    path.write_bytes(path.read_bytes()[:-10] if content is None else content)
    with pytest.raises(UserError, match="edufineweb_train_000001"):
        map_tokens(path)


HEADERS = [
    "{'descr': '<u2', 'fortran_order': False, 'shape': (1000,), }",  # complete
    "{'descr': '<u2', 'fortran_order': False, 'shape': (999,), }",  # a token less than the file has
    "{'descr': '<u2', 'fortran_order': False, 'shape': (1000",
    "{'descr': '<u2', 'fortran_order': False, 'shape': (-1,), }",
    "{'descr': '<u2', 'fortran_order': False, 'shape': (10**30,), }",
    "{'descr': '<u2', 'fortran_order': False, 'shape': (1" + "0" * 5000 + ",), }",
    "{'descr': ',', 'fortran_order': False, 'shape': (1000,), }",
    "{'descr': ('<u2', 10**9), 'fortran_order': False, 'shape': (1000,), }",
    "{'descr': 'V99999999999', 'fortran_order': False, 'shape': (1000,), }",
    "{1: 2, 'descr': '<u2', 'shape': (1000,)}",
    "  {\n 'descr'",
    "(" * 5000,
    "\0\0\0",
    "'" + '"',
]


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0), (9, 9)])
@pytest.mark.parametrize("number", range(len(HEADERS)))
def test_npy_header_that_does_not_describe_the_file_is_refused(tmp_path, number: int, version: tuple[int, int]) -> None:
    header = HEADERS[number].encode()
    length = len(header).to_bytes(2 if version == (1, 0) else 4, "little")
    path = tmp_path / "x_train_1.npy"
    path.write_bytes(npy.magic(*version) + length + header + np.arange(1000, dtype="<u2").tobytes())
    if number == 0 and version <= (2, 0):
        np.testing.assert_array_equal(map_tokens(path), np.arange(1000))
    else:
        with pytest.raises(UserError, match=r"x_train_1\.npy: (not a complete|holds)") as caught:
            map_tokens(path)
        assert "\n" not in str(caught.value)


def test_array_in_a_zip_file_or_a_pickle_is_refused(tmp_path) -> None:
    np.savez(tmp_path / "x.npz", np.arange(1000))
    (tmp_path / "x.npz").rename(tmp_path / "x.npy")
    with pytest.raises(UserError, match="not a complete"):
        map_tokens(tmp_path / "x.npy")
    np.save(tmp_path / "x.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(UserError, match="holds object"):
        map_tokens(tmp_path / "x.npy")


@pytest.mark.parametrize("array", [np.zeros(4), np.zeros((2, 2), np.uint16)])
def test_array_other_than_one_dimensional_integers_raises(tmp_path, array: np.ndarray) -> None:
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(UserError, match="token ids"):
        map_tokens(tmp_path / "x.npy")
