"""Converted tokenizers of tiktoken encode as tiktoken does, with small ranks and the patterns of the real ones."""

import base64
import hashlib
from pathlib import Path

import pytest
import tiktoken
import tiktoken_ext.openai_public as openai_public
from tiktoken._educational import bpe_train
from tokenizers import Tokenizer

from fira.data import tiktoken_tokenizer
from fira.data.tiktoken_tokenizer import NAMES, converted, is_tiktoken, tiktoken_file
from fira.data.tokenizer import eos_id, vocabulary
from fira.errors import UserError
from tests.launch import ROOT

TEXT = (ROOT / "README.md").read_text() + "Die Bäume   stehen im WALD.\r\n\n नमस्ते दुनिया! 🙂 don't 12345 "
SPECIAL = {"<|endoftext|>": 501, "<|endofprompt|>": 510}  # with gaps, as in o200k_base


@pytest.fixture(scope="module")
def ranks() -> dict[bytes, int]:
    return bpe_train(TEXT, 500, openai_public.r50k_pat_str, visualise=None)


@pytest.fixture
def published(
    ranks: dict[bytes, int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> tuple[Path, tiktoken.Encoding]:
    """A file of ranks, and the encoding o200k_base that has these ranks, as if it were published with them."""
    lines = b"".join(base64.b64encode(token) + f" {rank}\n".encode() for token, rank in ranks.items())
    path = tmp_path / "o200k_base.tiktoken"
    path.write_bytes(lines)
    expected = hashlib.sha256(lines).hexdigest()
    load = openai_public.load_tiktoken_bpe
    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda url, expected_hash: load(url, expected))
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.setenv("FIRA_CACHE", str(tmp_path / "cache"))
    return path, encoding("o200k_base", ranks)


def encoding(name: str, ranks: dict[bytes, int]) -> tiktoken.Encoding:
    """An encoding with these ranks and the pattern of a real one, which is a constant in its constructor."""
    constants = (value for value in getattr(openai_public, name).__code__.co_consts if isinstance(value, str | tuple))
    pattern = openai_public.r50k_pat_str
    if name == "o200k_base":
        (parts,) = (value for value in constants if isinstance(value, tuple) and len(value) == 7)
        pattern = "|".join(parts)
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=SPECIAL)


@pytest.mark.parametrize("name", NAMES)
def test_converted_tokenizer_encodes_as_tiktoken(name: str, ranks: dict[bytes, int]) -> None:
    theirs = encoding(name, ranks)
    ours = converted(theirs)
    for text in (TEXT, *TEXT.splitlines(keepends=True)):
        ids = ours.encode(text, add_special_tokens=False).ids
        assert ids == theirs.encode(text)
        assert ours.decode(ids, skip_special_tokens=False) == text
    assert ours.encode("a<|endoftext|>").ids == theirs.encode("a<|endoftext|>", allowed_special="all")
    assert eos_id(ours) == 501
    assert vocabulary(ours) == theirs.n_vocab == 511


def test_file_of_ranks_is_converted_once(
    published: tuple[Path, tiktoken.Encoding], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, theirs = published
    assert is_tiktoken(str(path))
    stored = tiktoken_file(str(path))
    assert Tokenizer.from_file(str(stored)).encode(TEXT).ids == theirs.encode(TEXT)
    monkeypatch.setattr(tiktoken_tokenizer, "converted", None)
    assert tiktoken_file(str(path)) == stored
    assert tiktoken_file("o200k_base") == stored


def test_invalid_names_files_and_a_missing_package_are_one_line_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FIRA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("requests.get", lambda url: (_ for _ in ()).throw(OSError("no network")))
    (tmp_path / "r50k_base.tiktoken").write_text("YQ== 0\n")
    for given, message in (
        (tmp_path / "mine.tiktoken", "one of o200k_base, r50k_base"),
        (tmp_path / "o200k_base.tiktoken", "no such file"),
        (tmp_path / "r50k_base.tiktoken", "not the ranks of r50k_base; copy https://.*/r50k_base.tiktoken"),
    ):
        with pytest.raises(UserError, match=message):
            tiktoken_file(str(given))
    monkeypatch.setitem(__import__("sys").modules, "tiktoken", None)
    with pytest.raises(UserError, match=r"needs the package tiktoken; pip install -e '\.\[tiktoken\]'"):
        tiktoken_file("r50k_base")
