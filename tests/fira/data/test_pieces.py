import subprocess
import sys

import pytest

from fira.data import pieces
from fira.data.pieces import encode_documents, split_long
from fira.data.tokenizer import train_tokenizer
from tests.launch import ROOT

TEXT = "The fox  ran\n\nover a hill, didn't it?   'tis so.\tयह हिन्दी है। (x1 = 22)\r\n </s> <|prompter|>" * 40


@pytest.mark.parametrize("text", [TEXT, "x" * 1000, " " * 1000, " x", "x ", ""])
def test_pieces_are_short_and_add_up_to_the_text(text: str, monkeypatch) -> None:
    monkeypatch.setattr(pieces, "PIECE", 50)
    parts = list(split_long(text))
    assert "".join(parts) == text
    assert max(map(len, parts)) <= 50


@pytest.mark.parametrize("piece", [20, 50, 77, 10_000])
def test_tokens_of_pieces_are_those_of_the_whole_text(piece: int, monkeypatch) -> None:
    tokenizer = train_tokenizer([TEXT], 500)
    texts = [TEXT, TEXT[:100], "short", TEXT[7:]]
    expected = [tokenizer.encode(text).ids for text in texts]
    monkeypatch.setattr(pieces, "PIECE", piece)
    monkeypatch.setattr(pieces, "BATCH", 200)  # a batch ends inside a text
    encoded = list(encode_documents(tokenizer, texts))
    assert [text for text, _ in encoded] == texts
    assert [ids.tolist() for _, ids in encoded] == expected


PREPARE = """
import resource, sys
from fira.data.corpus import prepare
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
corpus = prepare(sys.argv[1], vocab_size=300, cache_dir=sys.argv[2], progress=False)
print(corpus.summary["documents"], (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.slow
def test_memory_for_a_field_of_12_megabytes_is_bounded(tmp_path) -> None:
    """The tokenizer alone needs 200 bytes per character for a text that is not divided."""
    (tmp_path / "a.csv").write_text('text\n"' + "over the hill and far away " * (12_000_000 // 27) + '"\n')
    command = [sys.executable, "-c", PREPARE, str(tmp_path / "a.csv"), str(tmp_path / "cache")]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=150, check=True)
    documents, memory = map(int, finished.stdout.split())
    assert documents == 1
    assert memory < 600e6
