"""Prepared chats: the split, the cache, shortened examples and errors."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from fira.data.chat_template import Chat, ChatTemplate, EncodedChat
from fira.data.packed import PackedTokens, TokenSpan
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
    assert PackedTokens([TokenSpan(corpus.folder / "train-0-ids.npy")]).read(0, 2).tolist() == [64, 2]
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
    example = (EncodedChat(np.arange(len(trained), dtype=np.uint32), np.array(trained), np.array(trained), "x"),)
    turns = [i for i in range(len(trained)) if any(trained[i:]) and (i == 0 or (trained[i - 1] and not trained[i]))]
    fitting = [i for i in turns if len(trained) - i <= limit]
    start = fitting[0] if fitting else len(trained) - limit
    if not fitting and (trained[start] or not any(trained[start:])):
        with pytest.raises(UserError, match=f"answer of .* sequences of {limit} "):
            shortened(example, limit)
        return
    (result,) = shortened(example, limit)
    assert result.ids.tolist() == list(range(start, len(trained)))
    assert result.trained.tolist() == trained[start:]


def test_context_loses_whole_turns(folder: Path, tokenizer: Tokenizer) -> None:
    """Answers that are not trained end a turn as well."""
    turns = [message(role, role * 2) for _ in range(3) for role in ("user", "assistant")]
    (folder / "a.jsonl").write_text(
        "".join(json.dumps({"prompt": [*turns, message("user", f"{n}?")], "completion": "Ja"}) + "\n" for n in (1, 2))
    )
    (source,) = prepare(folder, str(folder / "a.jsonl"), 40).sources
    (text,) = texts(tokenizer, source.train)
    turn = "<|prompter|>useruser</s><|assistant|>assistantassistant</s>"
    assert re.fullmatch(rf"({re.escape(turn)})?<\|prompter\|>\d\?</s><\|assistant\|>Ja</s>", text)


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def write_pairs(path: Path, answers: list[tuple[str, str]], turns: int = 1) -> str:
    prompt = [message(role, f"{role} {turn}") for turn in range(turns) for role in ("user", "assistant")][:-1]
    records = [{"prompt": prompt, "chosen": chosen, "rejected": rejected} for chosen, rejected in answers]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_pairs_are_packed_as_chosen_and_rejected_document(folder: Path, tokenizer: Tokenizer) -> None:
    answers = [(f"{number} gut", f"{number} Wald") for number in range(40)]
    corpus = prepare(folder, write_pairs(folder / "a.jsonl", answers), pairs=True)
    train, val = (texts(tokenizer, part) for part in (corpus.sources[0].train, corpus.sources[0].val))
    prompt = "<|prompter|>user 0</s><|assistant|>"
    expected = [tuple(f"{prompt}{text}</s>" for text in pair) for pair in answers]
    pairs = [pair for part in (train, val) for pair in zip(part[::2], part[1::2], strict=True)]
    assert sorted(pairs) == sorted(expected)
    assert len(val) == 2 * 2  # 5 %
    assert (corpus.summary["train_examples"], corpus.summary["shortened"]) == (38, 0)
    assert len(corpus.sources[0].train) < 38  # several pairs in a sequence


@pytest.mark.parametrize("chosen", ["gut", "ja " * 8])
def test_both_chats_of_a_long_pair_lose_the_same_turns(folder: Path, tokenizer: Tokenizer, chosen: str) -> None:
    data = write_pairs(folder / "a.jsonl", [(chosen, "nein"), ("x", "y")], turns=3)
    whole = prepare(folder, data, 400, pairs=True).sources[0]
    documents = [text for part in (whole.train, whole.val) for text in texts(tokenizer, part) if "nein" in text]
    for limit in range(30, 200, 7):
        try:
            source = prepare(folder, data, limit, pairs=True).sources[0]
        except UserError as error:
            assert re.search(r"a\.jsonl, line 1: answer of \d+ and \d+ tokens, .*--seq-len", str(error))  # noqa: PT017
            continue
        found = [texts(tokenizer, part) for part in (source.train, source.val)]
        (pair,) = ((a, b) for part in found for a, b in zip(part[::2], part[1::2], strict=True) if "nein" in b)
        assert pair[1] in documents[0]
        cut = documents[0].removesuffix(pair[1])
        assert pair[0] == pair[1].removesuffix("nein</s>") + f"{chosen}</s>"
        assert cut in ("", *(documents[0][: at.end()] for at in re.finditer("assistant \\d</s>", documents[0]))) or (
            "user 2" not in cut and not re.search(r"assistant \d</s>", pair[1])
        )


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"prompt": "a", "chosen": "b"}, "line 2: has the fields 'prompt', 'chosen'; give records with prompt, chosen"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "line 2: chosen and rejected are equal"),
        ({"prompt": "a", "chosen": " ", "rejected": "b"}, "line 2: chosen, message 1: empty answer"),
        ({"prompt": "a", "chosen": "b", "rejected": "x" * 300}, r"line 2: answer of \d+ and \d+ tokens"),
    ],
)
def test_bad_pairs_are_named(folder: Path, record: dict[str, Any], problem: str) -> None:
    (folder / "a.jsonl").write_text(
        json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n" + json.dumps(record) + "\n"
    )
    with pytest.raises(UserError, match=problem):
        prepare(folder, str(folder / "a.jsonl"), pairs=True)


def test_pairs_without_a_common_prompt_are_refused(folder: Path) -> None:
    data = write_pairs(folder / "a.jsonl", [("gut", "Wald"), ("a", "b")])
    template = "{% generation %}{{ messages[-1].content }}</s>{% endgeneration %}"
    (folder / TOKENIZER_CONFIG).write_bytes(TokenizerConfig(chat_template=template).to_json())
    with pytest.raises(UserError, match=r"line 1: the chat template yields no prompt"):
        prepare(folder, data, pairs=True)
