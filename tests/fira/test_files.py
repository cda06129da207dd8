"""Reads of files whose names come from documents, and writes that fail."""

import errno
from pathlib import Path

import pytest

from fira.checkpoint.manifest import FileRecord
from fira.errors import UserError
from fira.files import read, replace


@pytest.mark.parametrize("access", [read, FileRecord(1, "0" * 64).check])
def test_name_that_no_file_system_allows_is_reported(tmp_path: Path, access) -> None:
    """A name of 200 characters may have more than 255 bytes."""
    with pytest.raises(UserError, match="File name too long"):
        access(tmp_path / ("é" * 200))


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC])
def test_failed_write_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """On a read-only file system the removal of the temporary file fails as well, on a full one it does not."""

    def fail(path: Path, content: bytes) -> None:
        if number == errno.ENOSPC:
            path.touch()
        raise OSError(number, "failed", str(path))

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if number == errno.EROFS:
            raise OSError(number, "failed", str(path))
        path_unlink(path, missing_ok)

    path_unlink = Path.unlink
    monkeypatch.setattr(Path, "write_bytes", fail)
    monkeypatch.setattr(Path, "unlink", unlink)
    with pytest.raises(UserError, match="failed"):
        replace(tmp_path / "file", b"content")
    assert list(tmp_path.iterdir()) == []
