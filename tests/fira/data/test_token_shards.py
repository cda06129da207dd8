import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from fira.data.document_index import index_of
from fira.data.packed import PackedTokens, TokenSpan
from fira.data.token_shards import Shards, find_shards
from fira.errors import UserError
from tests.fira.data.test_token_files import FIXTURES, INDEXED, MEGATRON, documents, llm_c


def shards(train: list[Path], val: list[Path]) -> Shards:
    """Shards that are used as a whole."""
    return Shards([TokenSpan(path) for path in train], [TokenSpan(path) for path in val])


def read(spans: list[TokenSpan]) -> list[int]:
    tokens = PackedTokens(spans)
    return tokens.read(0, len(tokens)).tolist()


def test_shards_are_found_by_name_and_both_kinds_are_required(tmp_path) -> None:
    assert find_shards(None) is None
    assert find_shards(str(tmp_path)) is None
    names = ["edufineweb_train_000002.npy", "edufineweb_train_000001.npy", "edufineweb_val_000000.npy"]
    for name in names[:2]:
        np.save(tmp_path / name, np.arange(3, dtype=np.uint16))
    with pytest.raises(UserError, match="_val_"):
        find_shards(str(tmp_path))
    np.save(tmp_path / names[2], np.arange(3, dtype=np.uint16))
    assert find_shards(str(tmp_path)) == shards([tmp_path / names[1], tmp_path / names[0]], [tmp_path / names[2]])
    with pytest.raises(UserError, match="the folder"):
        find_shards(str(tmp_path / names[2]))


def test_shards_with_an_upper_case_suffix_are_found(tmp_path) -> None:
    for name in ("x_train_1.NPY", "x_val_1.Npy"):
        np.save(tmp_path / "t.npy", np.arange(3, dtype=np.uint16))
        (tmp_path / "t.npy").rename(tmp_path / name)
    assert find_shards(str(tmp_path)) == shards([tmp_path / "x_train_1.NPY"], [tmp_path / "x_val_1.Npy"])
    with pytest.raises(UserError, match="the folder"):
        find_shards(str(tmp_path / "x_val_1.Npy"))


@pytest.mark.timeout(20)
def test_pipe_with_the_name_of_a_shard_is_refused_without_waiting(tmp_path) -> None:
    np.save(tmp_path / "x_train_1.npy", np.arange(3, dtype=np.uint16))
    os.mkfifo(tmp_path / "x_val_1.npy")
    with pytest.raises(UserError, match=r"x_val_1\.npy: not a regular file"):
        find_shards(str(tmp_path))


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("fineweb_train_000001", "fineweb_val_000000"),  # modded-nanogpt and llm.c
        ("tiny_shakespeare_train", "tiny_shakespeare_val"),  # llm.c
        ("train", "val"),
    ],
)
def test_shards_of_llm_c_are_found(tmp_path, train: str, val: str) -> None:
    for name, start in ((train, 0), (val, 500)):
        llm_c(tmp_path / f"{name}.bin", np.arange(start, start + 100).astype(np.uint16))
    found = find_shards(str(tmp_path))
    assert found == shards([tmp_path / f"{train}.bin"], [tmp_path / f"{val}.bin"])
    assert read(found.train) == [*range(100)]
    with pytest.raises(UserError, match="a single shard"):
        find_shards(str(tmp_path / f"{train}.bin"))


@pytest.mark.parametrize("name", INDEXED)
def test_last_tokens_of_an_indexed_file_are_for_validation(name: str) -> None:
    """The documents have 1, 3, …, 23 tokens. The last one has three times the share, so that it is divided."""
    found = find_shards(str(FIXTURES / name))
    assert found
    tokens = [token for document in documents() for token in document]
    assert read(found.train) + read(found.val) == tokens
    assert len(read(found.val)) == round(0.05 * len(tokens))
    assert found.files == [FIXTURES / name, index_of(FIXTURES / name)]


def test_document_is_not_divided_if_one_begins_near_the_share(tmp_path) -> None:
    ends = np.arange(10, 1001, 10, dtype="<u8")  # 100 documents of 10 tokens
    ends[94:96] = 943, 956  # of the document that contains token 950
    (tmp_path / "x.ds").write_bytes(np.arange(1000, dtype="<u2").tobytes())
    (tmp_path / "x.ds.index").write_bytes(ends.tobytes())
    found = find_shards(str(tmp_path))
    assert found
    assert read(found.val) == [*range(956, 1000)]


@pytest.mark.parametrize("name", MEGATRON)
def test_path_without_a_suffix_is_that_of_megatron(name: str) -> None:
    expected = find_shards(str(FIXTURES / name))
    prefix = str(FIXTURES / name).removesuffix(".bin")
    assert expected
    assert find_shards(prefix) == find_shards(f"{prefix}.idx") == expected


def test_folder_of_indexed_files_has_both_parts_of_each(tmp_path) -> None:
    for name in ("a", "b"):
        for suffix in (".bin", ".idx"):
            shutil.copy(FIXTURES / f"megatron_text_document{suffix}", tmp_path / f"{name}{suffix}")
    found = find_shards(str(tmp_path))
    assert found
    assert [span.path.name for span in found.train] == [span.path.name for span in found.val] == ["a.bin", "b.bin"]


@pytest.mark.parametrize("length", [252, 255, 300])
def test_name_that_is_too_long_is_a_user_error(length: int) -> None:
    """Some of these names are only too long with the suffix of an index."""
    with pytest.raises(UserError, match="too long"):
        find_shards("a" * length)
