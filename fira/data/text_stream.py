"""The documents of text files, one after another."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path

from fira.data.compression import Advance
from fira.data.readers import read_file
from fira.errors import UserError


class TextStream:
    """Yields the documents of `files` from the file with index `first` on, without those that are blank.

    data: the source with these files, for messages. advance: called with the number of bytes read. before: number of
    documents in the files before the first one. Raises UserError if there is no document at all.
    """

    def __init__(
        self,
        data: str | None,
        files: Sequence[Path],
        text_column: str,
        advance: Advance,
        first: int = 0,
        before: int = 0,
    ) -> None:
        self._data, self._files, self._text_column, self._advance = data, files, text_column, advance
        self._first, self._before = first, before
        self._starts: list[int] = []  # number of documents before each file that has been opened

    def __iter__(self) -> Iterator[str]:
        count = self._before
        for path in self._files[self._first :]:
            self._starts.append(count)
            for text in read_file(path, self._text_column, self._advance):
                if text and not text.isspace():
                    count += 1
                    yield text
        if not count:
            raise UserError(f"{self._data}: contains no text; give a file or folder with text")

    def place(self, document: int) -> tuple[int, int]:
        """Return the index of the file in which a document is, and the number of documents before this file.

        The file of the document before it must have been opened.
        """
        opened = bisect_right(self._starts, document) - 1
        return self._first + opened, self._starts[opened]
