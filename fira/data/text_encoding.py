"""Encodings of text files: UTF-8, or UTF-16 and UTF-32 with a byte order mark (BOM)."""

import codecs
from enum import Enum

HEAD = 8192  # bytes at the beginning of a file that are examined
MARKS = [  # UTF-32 first, because its little-endian mark begins with that of UTF-16
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
]
CONTROLS = frozenset(range(32)) - frozenset(b"\a\b\t\n\v\f\r\x1b") | {127}  # bytes that are not in text


class Content(Enum):
    """What a file contains."""

    TEXT = "text in UTF-8, or with a BOM"
    OTHER_TEXT = "probably text in another encoding, such as Latin-1, or UTF-16 without a BOM"
    BINARY = "no text"


def text_encoding(head: bytes) -> str | None:
    """Return the encoding of a text file that begins with `head`, or None if it cannot be read as text."""
    encoding = next((encoding for mark, encoding in MARKS if head.startswith(mark)), "utf-8")
    binary = encoding.startswith("utf-8") and b"\0" in head
    return None if binary or _decoded(head, encoding) is None else encoding


def content(head: bytes) -> Content:
    """Return what a file that begins with `head` contains."""
    if text_encoding(head):
        return Content.TEXT
    return Content.OTHER_TEXT if CONTROLS.isdisjoint(head) or _is_utf16(head) else Content.BINARY


def _decoded(head: bytes, encoding: str) -> str | None:
    """Return the text, None if it is invalid. The last character may be incomplete where the file continues."""
    try:
        return codecs.getincrementaldecoder(encoding)().decode(head, final=len(head) < HEAD)
    except UnicodeDecodeError:
        return None


def _is_utf16(head: bytes) -> bool:
    """Return whether these are printable characters in UTF-16 without a BOM, many of them in ASCII or Latin-1."""
    texts = (_decoded(head, encoding) for encoding in ("utf-16-le", "utf-16-be"))
    return head.count(0) * 4 > len(head) and any(text and "".join(text.split()).isprintable() for text in texts)
