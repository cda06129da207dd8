import pytest

from fira.data.text_encoding import HEAD, Content, content, text_encoding

TEXT = "Grüße, मित्र — done.\r\n\tNext line\x1b[0m\n" * 9


@pytest.mark.parametrize(
    ("encoding", "mark"),
    [
        ("utf-8", b""),
        ("utf-8", b"\xef\xbb\xbf"),
        ("utf-16-le", b"\xff\xfe"),
        ("utf-16-be", b"\xfe\xff"),
        ("utf-32-le", b"\xff\xfe\0\0"),
        ("utf-32-be", b"\0\0\xfe\xff"),
    ],
)
def test_text_decodes_to_the_same_characters(encoding: str, mark: bytes) -> None:
    for shift in range(4):  # a character is cut at the end of the head
        text = "x" * shift + TEXT * 30
        data = mark + text.encode(encoding)
        assert len(data) > HEAD
        assert data.decode(text_encoding(data[:HEAD])) == text
        assert content(data[:HEAD]) is Content.TEXT


@pytest.mark.parametrize(
    "data",
    [
        "crème brûlée".encode("latin-1"),
        "café".encode("latin-1"),
        "“déjà”\n".encode("cp1252"),
        "Привет, мир".encode("koi8-r"),
    ]
    + ["Hello, world\n".encode(encoding) for encoding in ("utf-16-le", "utf-16-be")],
)
def test_text_in_another_encoding_is_not_taken_for_binary(data: bytes) -> None:
    assert text_encoding(data) is None
    assert content(data) is Content.OTHER_TEXT


@pytest.mark.parametrize(
    "data",
    [
        b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
        b"\xff\xd8\xff\xe0\0\x10JFIF\0",
        b"\x1f\x8b\x08\0abc\xff",
        b"PK\x03\x04\x14\xff",
        b"MZ\0\x01",
        b"\x93NUMPY\x01\0",
        b"text\0text",
        b"\xef\xbb\xbftext\0text",
        bytes(range(256)) * (HEAD // 256),
    ],
)
def test_binary_file_is_recognised(data: bytes) -> None:
    assert content(data) is Content.BINARY
