"""Reads of files whose names come from documents."""

from pathlib import Path

import pytest

from fira.checkpoint.manifest import FileRecord
from fira.errors import UserError
from fira.files import read


@pytest.mark.parametrize("access", [read, FileRecord(1, "0" * 64).check])
def test_name_that_no_file_system_allows_is_reported(tmp_path: Path, access) -> None:
    """A name of 200 characters may have more than 255 bytes."""
    with pytest.raises(UserError, match="File name too long"):
        access(tmp_path / ("é" * 200))
