"""Encoding, streams of text, stop texts, several prompts and expert utilisation."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

import fira
from fira import evaluate_perplexity, expert_utilisation, sample_text
from fira.data.corpus import Corpus, prepare
from fira.data.tokenizer import eos_id
from fira.errors import UserError
from fira.generation.perplexity import perplexity
from fira.generation.text import TextStream, _default_tokenizer, continue_text
from fira.nn.moe.layer import MoE
from tests.fira.small_model import TEXT
from tests.launch import ROOT


def test_encode_and_decode(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "<s>def f(): return 'नमस्ते 🙂'\n\t</s>"
    ids = fira.encode(text, tokenizer)
    assert ids[-1] == eos_id(tokenizer)
    assert fira.decode(ids, tokenizer) == fira.decode(torch.tensor(ids), tokenizer) == text
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    assert fira.encode(text, path) == fira.encode(text, str(path)) == ids
    monkeypatch.chdir(tmp_path)
    assert fira.encode(text) == ids  # tokenizer.json in the current folder
    assert fira.decode(ids) == text
    with pytest.raises(UserError, match="no such tokenizer"):
        fira.encode(text, "missing.json")


def test_default_tokenizer_is_that_of_the_default_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "corpus.txt").write_text(TEXT * 9, encoding="utf-8")
    vocab_sizes: list[int] = []

    def small_corpus(vocab_size: int) -> Corpus:
        vocab_sizes.append(vocab_size)
        return prepare(str(tmp_path / "corpus.txt"), vocab_size=vocab_size, cache_dir=tmp_path, progress=False)

    monkeypatch.setattr("fira.generation.text.prepare", small_corpus)
    monkeypatch.chdir(tmp_path)
    _default_tokenizer.cache_clear()
    ids = fira.encode(TEXT)
    assert fira.decode(ids) == TEXT
    assert vocab_sizes == [2048]  # the vocabulary of fira-tiny; prepared once
    small = Tokenizer.from_file(str(small_corpus(2048).tokenizer))
    assert ids == small.encode(TEXT, add_special_tokens=False).ids
    _default_tokenizer.cache_clear()


def test_public_names_are_imported_lazily() -> None:
    script = "import sys, fira; assert 'torch' not in sys.modules; fira.FIRA; assert 'torch' in sys.modules"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=60).returncode == 0
    assert all(callable(getattr(fira, name)) for name in fira.__all__)
    with pytest.raises(AttributeError, match="no attribute 'wrong'"):
        _ = fira.wrong


def test_pieces_contain_complete_characters(scripted_model: Any, tokenizer: Tokenizer) -> None:
    ids = fira.encode(TEXT, tokenizer)
    scripted_model.will_generate(TEXT)
    pieces = list(continue_text(scripted_model, ids[:20], 1000))
    assert len(pieces) == len(ids) + 1  # with EOS
    assert len(ids) > len(list(filter(None, pieces)))  # some characters have several tokens
    assert "".join(pieces) == TEXT
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (["im Wald"], "Die Bäume stehen "),
        (["Wald", "stehen"], "Die Bäume "),
        (["fehlt", ""], TEXT),
        (["🙂"], TEXT[: TEXT.index("🙂")]),
        (["im Walde", "Wald. न"], "Die Bäume stehen im "),
        (["🙂 Ende"], TEXT),
    ],
)
def test_generation_ends_before_a_stop_text(scripted_model: Any, stop: list[str], expected: str) -> None:
    """No part of a stop text is returned, and text that only resembles its beginning is not lost."""
    scripted_model.will_generate(TEXT)
    pieces = list(continue_text(scripted_model, [5], 1000, stop))
    assert "".join(pieces) == expected
    for end in range(len(pieces)):
        assert expected.startswith("".join(pieces[:end]))


def test_stream_delays_only_a_possible_beginning_of_a_stop_text(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, [], ["abcd"])
    pieces = [stream.add(token) for text in ("xab", "c", "e", "ab") for token in fira.encode(text, tokenizer)]
    assert "".join(pieces) == "xabce"
    assert (stream.pending, stream.stopped) == ("ab", False)


def test_batch_of_prompts_equals_single_prompts(model: Any) -> None:
    prompts = ["def", "Die Bäume stehen", ""]
    batch = sample_text(model, prompts, 12, temperature=1.0, seed=3)
    assert batch == [sample_text(model, prompt, 12, temperature=1.0, seed=3 + i) for i, prompt in enumerate(prompts)]
    assert all(text.startswith(prompt) for text, prompt in zip(batch, prompts, strict=True))
    text = sample_text(model, "def", 12, temperature=0)
    stop = text[7]
    assert sample_text(model, "def", 12, temperature=0, stop=[stop]) == "def" + text[3:].split(stop)[0]


def test_evaluated_text_begins_a_document(model: Any, tokenizer: Tokenizer) -> None:
    ids = [eos_id(tokenizer), *fira.encode(TEXT, tokenizer)]
    assert evaluate_perplexity(model, TEXT) == perplexity(model, ids).perplexity
    model.tokenizer = None
    with pytest.raises(UserError, match="has no tokenizer"):
        sample_text(model, "def")


def test_utilisation_is_the_fraction_of_assignments(model: Any, tokenizer: Tokenizer) -> None:
    """Recompute the choices of each layer in one window from its inputs and the router's weights."""
    text = "def main"
    ids = [eos_id(tokenizer), *fira.encode(text, tokenizer)][:-1]
    expected, hooks = {}, []
    for moe in (module for module in model.modules() if isinstance(module, MoE)):

        def record(module: Any, inputs: Any, _output: Any, index: int = moe.index) -> None:
            logits = inputs[0] @ module.gate.weight.T + module.gate.bias
            chosen = logits.topk(2).indices
            expected[index] = [float((chosen == e).sum()) / chosen.numel() for e in range(4)]

        hooks.append(moe.router.register_forward_hook(record))
    model(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    result = expert_utilisation(model, text)
    assert result.keys() == expected.keys() == {1, 2}
    for layer in result:
        assert result[layer] == pytest.approx(expected[layer])
    assert not model.layers[1].moe.router._forward_hooks
