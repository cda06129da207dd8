import numpy as np
import pytest

from fira.data.packed import PackedTokens, TokenSpan, TokenWriter


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
    tokens, expected = PackedTokens([TokenSpan(path) for path in paths]), np.concatenate(parts)
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
        chunks = list(PackedTokens([TokenSpan(tmp_path / "t.npy")]).chunks())
        assert [len(chunk) for chunk in chunks] == lengths
        assert np.concatenate(chunks).tolist() == list(range(23))
