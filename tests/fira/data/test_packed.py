import os

import numpy as np
import pytest
from numpy.lib import format as npy

from fira.data.packed import PackedTokens, TokenWriter, find_shards
from fira.errors import UserError


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_536, "uint16"), (65_537, "uint32")])
def test_token_writer_writes_a_standard_npy_file(tmp_path, vocab_size: int, dtype: str) -> None:
    with TokenWriter(tmp_path / "t.npy", vocab_size) as writer:
        for piece in ([0, vocab_size - 1], [], list(range(1000))):
            writer.append(piece)
    array = np.load(tmp_path / "t.npy")
    assert array.dtype == dtype
    assert array.tolist() == [0, vocab_size - 1, *range(1000)]


def test_id_too_large_for_the_dtype_raises(tmp_path) -> None:
    with TokenWriter(tmp_path / "t.npy", 300) as writer, pytest.raises(OverflowError):
        writer.append([70_000])
    with TokenWriter(tmp_path / "t.npy", 300) as writer, pytest.raises(OverflowError):
        writer.append([300])


def test_shards_are_read_as_one_array(tmp_path) -> None:
    parts = [np.arange(10), np.arange(0), np.arange(100, 117), np.arange(3)]
    paths = [tmp_path / f"{i}.npy" for i in range(len(parts))]
    for path, part in zip(paths, parts, strict=True):
        np.save(path, part.astype(np.uint16))
    tokens, expected = PackedTokens(paths), np.concatenate(parts)
    assert len(tokens) == 30
    for start in range(31):
        for stop in range(start, 31):
            np.testing.assert_array_equal(tokens.read(start, stop), expected[start:stop])
    assert tokens.read(0, 5).dtype == np.int64
    for start, stop in ((-1, 3), (5, 31), (4, 3)):
        with pytest.raises(IndexError):
            tokens.read(start, stop)


def test_chunks_cover_all_tokens_in_order(tmp_path, monkeypatch) -> None:
    np.save(tmp_path / "t.npy", np.arange(23, dtype=np.uint16))
    for size, lengths in ((10, [10, 10, 3]), (23, [23]), (1, [1] * 23)):
        monkeypatch.setattr("fira.data.packed.SCAN_TOKENS", size)
        chunks = list(PackedTokens([tmp_path / "t.npy"]).chunks())
        assert [len(chunk) for chunk in chunks] == lengths
        assert np.concatenate(chunks).tolist() == list(range(23))


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"raw tokens", None])
def test_incomplete_npy_file_is_named(tmp_path, content: bytes | None) -> None:
    path = tmp_path / "edufineweb_train_000001.npy"
    np.save(path, np.arange(1000, dtype=np.uint16))
    path.write_bytes(path.read_bytes()[:-10] if content is None else content)
    with pytest.raises(UserError, match="edufineweb_train_000001"):
        PackedTokens([path])


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
        np.testing.assert_array_equal(PackedTokens([path]).read(0, 1000), np.arange(1000))
    else:
        with pytest.raises(UserError, match=r"x_train_1\.npy: (not a complete|holds)") as caught:
            PackedTokens([path])
        assert "\n" not in str(caught.value)


def test_array_in_a_zip_file_or_a_pickle_is_refused(tmp_path) -> None:
    np.savez(tmp_path / "x.npz", np.arange(1000))
    (tmp_path / "x.npz").rename(tmp_path / "x.npy")
    with pytest.raises(UserError, match="not a complete"):
        PackedTokens([tmp_path / "x.npy"])
    np.save(tmp_path / "x.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(UserError, match="holds object"):
        PackedTokens([tmp_path / "x.npy"])


@pytest.mark.parametrize("array", [np.zeros(4), np.zeros((2, 2), np.uint16)])
def test_array_other_than_one_dimensional_integers_raises(tmp_path, array: np.ndarray) -> None:
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(UserError, match="token ids"):
        PackedTokens([tmp_path / "x.npy"])


def test_shards_are_found_by_name_and_both_kinds_are_required(tmp_path) -> None:
    assert find_shards(None) is None
    assert find_shards(str(tmp_path)) is None
    names = ["edufineweb_train_000002.npy", "edufineweb_train_000001.npy", "edufineweb_val_000000.npy"]
    for name in names[:2]:
        np.save(tmp_path / name, np.arange(3, dtype=np.uint16))
    with pytest.raises(UserError, match="_val_"):
        find_shards(str(tmp_path))
    np.save(tmp_path / names[2], np.arange(3, dtype=np.uint16))
    assert find_shards(str(tmp_path)) == ([tmp_path / names[1], tmp_path / names[0]], [tmp_path / names[2]])
    with pytest.raises(UserError, match="the folder"):
        find_shards(str(tmp_path / names[2]))


def test_shards_with_an_upper_case_suffix_are_found(tmp_path) -> None:
    for name in ("x_train_1.NPY", "x_val_1.Npy"):
        np.save(tmp_path / "t.npy", np.arange(3, dtype=np.uint16))
        (tmp_path / "t.npy").rename(tmp_path / name)
    assert find_shards(str(tmp_path)) == ([tmp_path / "x_train_1.NPY"], [tmp_path / "x_val_1.Npy"])
    with pytest.raises(UserError, match="the folder"):
        find_shards(str(tmp_path / "x_val_1.Npy"))


@pytest.mark.timeout(20)
def test_pipe_with_the_name_of_a_shard_is_refused_without_waiting(tmp_path) -> None:
    np.save(tmp_path / "x_train_1.npy", np.arange(3, dtype=np.uint16))
    os.mkfifo(tmp_path / "x_val_1.npy")
    with pytest.raises(UserError, match=r"x_val_1\.npy: not a regular file"):
        find_shards(str(tmp_path))
