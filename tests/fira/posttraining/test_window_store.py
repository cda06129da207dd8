"""Rows that are computed once: kept between runs, completed after a kill, and replaced when the key changes."""

from pathlib import Path

import numpy as np
import pytest

from fira.data.rows import Rows
from fira.errors import UserError
from fira.posttraining.window_store import Column, StoredWindows, WindowStore

COLUMNS = {"a": Column((3,), np.float32), "b": Column((), np.uint16)}


class Numbers:
    """Windows whose tokens are their own number."""

    def __len__(self) -> int:
        return 9

    def rows(self, numbers: list[int], count: int) -> Rows:
        tokens = np.zeros((count, 3), np.int64)
        tokens[: len(numbers)] = np.array(numbers)[:, None]
        return Rows(tokens, tokens)


def compute(rows: Rows) -> dict[str, np.ndarray]:
    return {"a": rows.tokens * 0.5, "b": rows.tokens[:, 0] + 1}


def open_store(folder: Path, key: int = 0) -> WindowStore:
    return WindowStore(folder, "train-0", 9, COLUMNS, {"key": key})


def test_only_missing_rows_are_computed(tmp_path: Path) -> None:
    computed: list[int] = []

    def counted(rows: Rows) -> dict[str, np.ndarray]:
        computed.extend(rows.tokens[:, 0])
        return compute(rows)

    open_store(tmp_path).fill(Numbers(), [4, 7, 4, 1], 2, counted)
    store = open_store(tmp_path)  # of the next run
    store.fill(Numbers(), [7, 8, 1], 2, counted)
    assert computed == [4, 7, 1, 8]
    rows = StoredWindows(Numbers(), store, counted).rows([8, 4], 3)
    assert len(computed) == 4
    np.testing.assert_array_equal(rows.tokens[:, 0], [8, 4, 0])
    np.testing.assert_array_equal(rows.stored["a"], [[4.0] * 3, [2.0] * 3, [0.0] * 3])
    np.testing.assert_array_equal(rows.stored["b"], [9, 5, 0])
    assert store.bytes() == 4 * (3 * 4 + 2 + 1)
    np.testing.assert_array_equal(StoredWindows(Numbers(), store, counted).rows([2, 8], 2).stored["b"], [3, 9])
    assert computed[4:] == [2]  # when it is read


def test_another_key_begins_again(tmp_path: Path) -> None:
    open_store(tmp_path).fill(Numbers(), [1, 2], 2, compute)
    assert open_store(tmp_path).missing(range(4)) == [0, 3]
    assert open_store(tmp_path, key=1).missing(range(4)) == [0, 1, 2, 3]


def test_arrays_of_another_shape_begin_again(tmp_path: Path) -> None:
    """As with another number of tokens of a teacher, after a start that was interrupted."""
    open_store(tmp_path).fill(Numbers(), [1, 2], 2, compute)
    narrow = WindowStore(tmp_path, "train-0", 9, {**COLUMNS, "a": Column((2,), np.float32)}, {"key": 0})
    assert narrow.missing([1, 2]) == [1, 2]
    narrow.fill(Numbers(), [8], 1, lambda rows: {"a": rows.tokens[:, :2], "b": rows.tokens[:, 0]})
    np.testing.assert_array_equal(narrow.rows([8], 1)["a"], [[8, 8]])
    assert WindowStore(tmp_path, "train-0", 10, COLUMNS, {"key": 0}).missing([8, 9]) == [8, 9]


@pytest.mark.parametrize("size", [0, 50, 140])
def test_damaged_array_is_named(tmp_path: Path, size: int) -> None:
    open_store(tmp_path)
    with open(path := tmp_path / "train-0-a.npy", "r+b") as file:
        file.truncate(size)
    with pytest.raises(UserError, match=r"train-0-a\.npy is damaged .*; remove it"):
        open_store(tmp_path)
    path.unlink()
    assert open_store(tmp_path).missing([1]) == [1]


def test_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"train-0\.json"):
        open_store(tmp_path / "file")
