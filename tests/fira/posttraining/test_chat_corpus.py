"""Prepared chats: the split, the cache, shortened examples and errors."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from fira.data.chat_template import Chat, ChatTemplate, EncodedChat
from fira.data.packed import PackedTokens
from fira.data.tokenizer import load_tokenizer
from fira.data.tokenizer_config import TOKENIZER_CONFIG, TokenizerConfig, default_config, read_config_beside
from fira.errors import UserError
from fira.posttraining import chat_corpus
from fira.posttraining.chat_corpus import ChatCorpus, prepare_chats, shortened
from fira.posttraining.packed_examples import PackedExamples

QUESTIONS = [f"Was ist {number} im Wald?" for number in range(60)]
SEQ_LEN = 100


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FIRA_CACHE", str(tmp_path / "cache"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def write(path: Path, questions: Sequence[str]) -> str:
    records = [{"prompt": question, "completion": f"{len(question)} Bäume"} for question in questions]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def prepare(folder: Path, data: str, seq_len: int = SEQ_LEN, **settings: Any) -> ChatCorpus:
    return prepare_chats(data, folder / "tokenizer.json", 300, seq_len, progress=False, **settings)


def texts(tokenizer: Tokenizer, examples: PackedExamples) -> list[str]:
    rows = examples.rows(range(len(examples)), len(examples))
    return [
        tokenizer.decode(tokens[numbers == number].tolist(), skip_special_tokens=False)
        for tokens, numbers in zip(rows.tokens, rows.documents, strict=True)
        for number in range(numbers.max() + 1)
    ]


def test_every_chat_is_in_one_split_independently_of_the_order(folder: Path, tokenizer: Tokenizer) -> None:
    (source,) = prepare(folder, write(folder / "a.jsonl", QUESTIONS)).sources
    train, val = texts(tokenizer, source.train), texts(tokenizer, source.val)
    expected = [f"<|prompter|>{text}</s><|assistant|>{len(text)} Bäume</s>" for text in QUESTIONS]
    assert sorted(train + val) == sorted(expected)
    assert len(val) == 3  # 5 %
    (reverse,) = prepare(folder, write(folder / "b.jsonl", QUESTIONS[::-1])).sources
    assert sorted(texts(tokenizer, reverse.val)) == sorted(val)
    (source,) = prepare(folder, write(folder / "c.jsonl", QUESTIONS[:2] * 4)).sources
    assert [len({*texts(tokenizer, part)}) for part in (source.train, source.val)] == [1, 1]


def test_summary_counts_what_is_read(folder: Path) -> None:
    corpus = prepare(folder, write(folder / "a.jsonl", QUESTIONS))
    rows = corpus.sources[0].train.rows(range(len(corpus.sources[0].train)), len(corpus.sources[0].train))
    summary = corpus.summary
    assert summary["train_tokens"] == (rows.documents >= 0).sum()
    assert summary["train_trained_tokens"] == (rows.targets != -100).sum()
    assert (summary["train_examples"], summary["val_examples"], summary["shortened"]) == (57, 3, 0)
    assert summary["train_fill"] == (rows.documents >= 0).mean() > 0.8


def test_sources_are_separate_and_their_counts_are_summed(folder: Path) -> None:
    one, two = write(folder / "a.jsonl", QUESTIONS), write(folder / "b.jsonl", QUESTIONS[:20])
    corpus = prepare(folder, f"{one}=0.75,{two}=0.25")
    assert [source.weight for source in corpus.sources] == [0.75, 0.25]
    parts = [prepare(folder, data).summary for data in (one, two)]
    assert {name: sum(part[name] for part in parts) for name in parts[0] if "fill" not in name}.items() <= (
        corpus.summary.items()
    )
    sequences = [part["train_sequences"] for part in parts]
    fills = [part["train_fill"] for part in parts]
    assert corpus.summary["train_fill"] == pytest.approx(np.average(fills, weights=sequences))


def test_cache_key_is_data_tokenizer_template_and_length(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write(folder / "a.jsonl", QUESTIONS)
    first = prepare(folder, data)
    with monkeypatch.context() as no_work:
        no_work.setattr(chat_corpus, "read_chats", None)
        assert prepare(folder, data).folder == first.folder
        assert prepare(folder, data, verified=first.folder).summary == first.summary
    folders = {first.folder, prepare(folder, data, 90).folder}
    (folder / TOKENIZER_CONFIG).write_bytes(
        TokenizerConfig(chat_template="{% generation %}a{% endgeneration %}").to_json()
    )
    with pytest.raises(UserError, match="no two different examples"):
        prepare(folder, data)
    (folder / TOKENIZER_CONFIG).write_bytes(TokenizerConfig(eos_token="<s>").to_json())
    folders.add(prepare(folder, data).folder)
    folders.add(prepare(folder, write(folder / "a.jsonl", QUESTIONS[1:])).folder)
    assert len(folders) == 4
    assert not list((folder / "cache").glob(".*"))


def test_damaged_cache_is_prepared_again(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = write(folder / "a.jsonl", QUESTIONS)
    ids = prepare(folder, data).folder / "train-0-ids.npy"
    content = ids.read_bytes()
    ids.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert prepare(folder, data).folder == ids.parent
    assert "train-0-ids.npy: damaged" in caplog.text
    assert ids.read_bytes() == content


def test_vocabulary_without_roles_is_extended(folder: Path) -> None:
    words = ["a", "</s>", "Was", "Wald", *map(str, range(60))]
    plain = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="a"))
    plain.add_special_tokens(["</s>"])
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    plain.save(str(folder / "tokenizer.json"))
    data = write(folder / "a.jsonl", QUESTIONS)
    corpus = prepare(folder, data)
    extended = load_tokenizer(corpus.tokenizer)
    assert [extended.token_to_id(name) for name in ("<|prompter|>", "<|assistant|>", "Wald")] == [64, 65, 3]
    config = read_config_beside(extended, corpus.tokenizer)
    assert config == default_config(extended)
    chat = next(ChatTemplate(extended, config).encode([Chat([{"role": "assistant", "content": "Was"}])]))
    assert chat.ids.tolist() == [65, 2, 1]
    assert PackedTokens([corpus.folder / "train-0-ids.npy"]).read(0, 2).tolist() == [64, 2]
    with pytest.raises(UserError, match="66 tokens with those of the chat template, the model has 65"):
        prepare_chats(data, folder / "tokenizer.json", 65, SEQ_LEN, progress=False)


def test_one_example_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="no two different examples"):
        prepare(folder, write(folder / "a.jsonl", QUESTIONS[:1] * 3))
    assert not [path for path in (folder / "cache").iterdir() if not path.name.startswith("sha")]


def test_answer_longer_than_a_sequence_is_named(folder: Path, tokenizer: Tokenizer) -> None:
    data = write(folder / "a.jsonl", [*QUESTIONS, "x" * 50])
    answer = len(tokenizer.encode("50 Bäume").ids) + 1
    longest = len(tokenizer.encode(QUESTIONS[0]).ids) + 3 + answer
    assert prepare(folder, data, longest).summary["shortened"] >= 1
    assert prepare(folder, data, answer + 1).summary["shortened"] == 61
    with pytest.raises(UserError, match=rf"a\.jsonl, line 1: answer of {answer} tokens, .*of {answer} .*--seq-len"):
        prepare(folder, data, answer)


@given(st.lists(st.booleans(), min_size=1, max_size=14).filter(any), st.integers(1, 16))
def test_shortened_example_begins_with_a_turn_or_in_the_last_question(trained: list[bool], limit: int) -> None:
    example = EncodedChat(np.arange(len(trained), dtype=np.uint32), np.array(trained), "x")
    turns = [i for i in range(len(trained)) if any(trained[i:]) and (i == 0 or (trained[i - 1] and not trained[i]))]
    fitting = [i for i in turns if len(trained) - i <= limit]
    start = fitting[0] if fitting else len(trained) - limit
    if not fitting and (trained[start] or not any(trained[start:])):
        with pytest.raises(UserError, match=f"answer of .* sequences of {limit} "):
            shortened(example, limit)
        return
    result = shortened(example, limit)
    assert result.ids.tolist() == list(range(start, len(trained)))
    assert result.trained.tolist() == trained[start:]
