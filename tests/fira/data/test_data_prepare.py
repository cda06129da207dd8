import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

from fira.data import cache as cache_module
from fira.data import prepare as module
from fira.data.prepare import Corpus, prepare
from fira.data.sources import documents
from fira.data.tokenizer import eos_id, load_tokenizer, train_tokenizer, vocabulary
from fira.errors import UserError
from tests.launch import ROOT

SCRIPT = ROOT / "scripts" / "prepare_data.py"
STORIES = [f"Story {i}: the fox number {i * i} ran over {'a hill and ' * (i % 7)}home.\n" for i in range(400)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("FIRA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def jsonl(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def stories(corpus: Corpus) -> tuple[list[str], list[str]]:
    """The documents of both splits, read back from the tokens."""
    tokenizer = load_tokenizer(corpus.tokenizer)
    parts = []
    for tokens in (corpus.sources[0].train, corpus.sources[0].val):
        ids = tokens.read(0, len(tokens))
        assert ids[-1] == eos_id(tokenizer)
        pieces = np.split(ids, np.flatnonzero(ids == eos_id(tokenizer)) + 1)[:-1]
        parts.append([tokenizer.decode(piece[:-1].tolist(), skip_special_tokens=False) for piece in pieces])
    return parts[0], parts[1]


def test_every_document_is_whole_in_one_split_whatever_the_order(tmp_path) -> None:
    train, val = stories(prepare(jsonl(tmp_path / "a.jsonl", STORIES), vocab_size=400))
    assert sorted(train + val) == sorted(STORIES)
    assert 0.02 < len(val) / len(STORIES) < 0.1
    assert train == [text for text in STORIES if text in train]  # in the order they came
    _, other = stories(prepare(jsonl(tmp_path / "b.jsonl", STORIES[::-1]), vocab_size=400))
    assert sorted(other) == sorted(val)


@pytest.mark.parametrize("texts", [["one document only " * 50], ["the same again " * 9] * 50, STORIES[:3]])
def test_few_or_equal_documents_give_their_ends_to_validation(tmp_path, texts: list[str]) -> None:
    corpus = prepare(jsonl(tmp_path / "a.jsonl", texts), vocab_size=300)
    train, val = stories(corpus)
    assert [a + b for a, b in zip(train, val, strict=True)] == texts
    assert 0 < len(corpus.sources[0].val) < 0.25 * len(corpus.sources[0].train)


def test_a_document_too_short_for_a_twentieth_gives_one_token(tmp_path) -> None:
    corpus = prepare(jsonl(tmp_path / "a.jsonl", ["abcdefgh", "12345678"]), vocab_size=261)  # a token per byte
    assert stories(corpus) == (["abcdefg", "1234567"], ["h", "8"])


def test_summary_counts_what_there_is(tmp_path) -> None:
    corpus = prepare(jsonl(tmp_path / "a.jsonl", STORIES), vocab_size=400)
    assert corpus.summary["documents"] == 400
    assert corpus.summary["bytes"] == sum(len(text.encode()) for text in STORIES)
    assert (corpus.summary["train_tokens"], corpus.summary["val_tokens"]) == (
        len(corpus.sources[0].train),
        len(corpus.sources[0].val),
    )
    assert 0 < corpus.summary["trigram"] < corpus.summary["unigram"] < np.log(400)


def test_the_cache_answers_for_the_same_content_only(tmp_path, monkeypatch) -> None:
    data = jsonl(tmp_path / "a.jsonl", STORIES)
    first = prepare(data, vocab_size=400)
    with monkeypatch.context() as without_work:
        without_work.setattr(module._Work, "pack", None)
        shutil.copy(data, tmp_path / "copy.jsonl")
        assert prepare(str(tmp_path / "copy.jsonl"), vocab_size=400).folder == first.folder
    keys = {first.folder, prepare(data, vocab_size=401).folder, prepare(data, "text", first.tokenizer, 400).folder}
    shutil.copy(data, tmp_path / "as_text.txt")
    keys.add(prepare(str(tmp_path / "as_text.txt"), vocab_size=400).folder)
    jsonl(tmp_path / "a.jsonl", [*STORIES, "one more"])
    keys.add(prepare(data, vocab_size=400).folder)
    assert len(keys) == 5


def test_a_tokenizer_is_not_taken_for_data(tmp_path) -> None:
    """The same two files: a text and its tokenizer, or a folder of both."""
    (tmp_path / "both").mkdir()
    (tmp_path / "both" / "a.txt").write_text("".join(STORIES))
    train_tokenizer(STORIES, 300).save(str(tmp_path / "both" / "b.json"))
    both = prepare(str(tmp_path / "both"), vocab_size=400)
    one = prepare(str(tmp_path / "both" / "a.txt"), tokenizer_path=tmp_path / "both" / "b.json", vocab_size=400)
    assert one.summary["bytes"] < both.summary["bytes"]


def test_a_large_file_is_read_again_only_when_it_changed(tmp_path, cache, monkeypatch) -> None:
    monkeypatch.setattr(cache_module, "REMEMBERED", 1000)
    data = jsonl(tmp_path / "a.jsonl", STORIES)
    first = prepare(data, vocab_size=400).folder
    (memory,) = (cache / "sha256").iterdir()
    with monkeypatch.context() as unreadable:
        unreadable.setattr(
            cache_module.hashlib, "sha256", lambda data: hashlib.new("sha256", data)
        )  # cannot begin empty
        assert prepare(data, vocab_size=400).folder == first
    jsonl(tmp_path / "a.jsonl", [STORIES[1], STORIES[0], *STORIES[2:]])  # as long as before
    assert prepare(data, vocab_size=400).folder != first
    assert len(list((cache / "sha256").iterdir())) == 2
    assert memory.read_text() == hashlib.sha256(Path(jsonl(tmp_path / "b.jsonl", STORIES)).read_bytes()).hexdigest()


def test_preparing_twice_gives_the_same_bytes(tmp_path) -> None:
    data = jsonl(tmp_path / "a.jsonl", STORIES)
    one, two = (prepare(data, vocab_size=400, cache_dir=tmp_path / name).folder for name in "xy")
    names = ["summary.json", "tokenizer.json", "train-0.npy", "val-0.npy"]
    assert sorted(path.name for path in one.iterdir()) == names
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in names)


def test_processes_at_the_same_time_and_one_killed_leave_one_whole_result(tmp_path, cache) -> None:
    data = jsonl(tmp_path / "a.jsonl", STORIES * 10)
    command = [sys.executable, str(SCRIPT), "--data", data, "--vocab_size=400"]
    jobs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    try:
        deadline = time.monotonic() + 60
        while not list(cache.glob(".*.partial")) and time.monotonic() < deadline:
            time.sleep(0.01)
        jobs[0].send_signal(signal.SIGKILL)
        assert [job.wait(timeout=60) for job in jobs] == [-signal.SIGKILL, 0, 0]
    finally:
        for job in jobs:
            job.kill()
            job.communicate()
    whole = [path for path in cache.iterdir() if not path.name.endswith(".partial")]
    assert whole == [prepare(data, vocab_size=400).folder]
    assert len(list(cache.glob(".*.partial"))) <= 1  # the killed one's, if it came that far
    for left in cache.glob(".*.partial"):
        os.utime(left, (0, 0))
    prepare(data, vocab_size=500)
    assert not list(cache.glob(".*.partial"))


def test_an_error_leaves_nothing_behind(tmp_path, cache) -> None:
    data = jsonl(tmp_path / "a.jsonl", STORIES)
    with pytest.raises(UserError, match="no column 'body'"):
        prepare(data, "body", vocab_size=400)
    assert not list(cache.iterdir())


def test_a_large_text_trains_the_tokenizer_on_a_sample(tmp_path, monkeypatch) -> None:
    seen: list[str] = []

    def spy(texts, vocab_size: int):
        seen.extend(texts)
        return train_tokenizer(seen, vocab_size)

    monkeypatch.setattr(module, "TOKENIZER_BYTES", 0.25 * len("".join(STORIES)))
    monkeypatch.setattr(module, "train_tokenizer", spy)
    prepare(jsonl(tmp_path / "a.jsonl", STORIES), vocab_size=300)
    assert 0.1 < len(seen) / len(STORIES) < 0.4


def test_one_document_larger_than_the_sample_still_trains_a_tokenizer(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(module, "TOKENIZER_BYTES", 10)
    corpus = prepare(jsonl(tmp_path / "a.jsonl", ["".join(STORIES)]), vocab_size=300)
    assert vocabulary(load_tokenizer(corpus.tokenizer)) == 300


def test_a_given_tokenizer_is_used_and_must_fit(tmp_path) -> None:
    mine = train_tokenizer(["abc abd " * 99], 270)
    mine.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])  # not wanted here
    mine.save(str(tmp_path / "mine.json"))
    data = jsonl(tmp_path / "a.jsonl", STORIES)
    corpus = prepare(data, tokenizer_path=tmp_path / "mine.json", vocab_size=50304)
    assert corpus.tokenizer.read_bytes() == (tmp_path / "mine.json").read_bytes()
    assert sorted(chain(*stories(corpus))) == sorted(STORIES)
    with pytest.raises(UserError, match=r"mine\.json.*--vocab-size 265"):
        prepare(data, tokenizer_path=tmp_path / "mine.json", vocab_size=265)


def shards(folder: Path) -> str:
    draw = np.random.default_rng(0)
    for name, size in (("train_000001", 5000), ("train_000002", 3000), ("val_000000", 900)):
        np.save(folder / f"edufineweb_{name}.npy", (draw.zipf(1.5, size) % 500).astype(np.uint16))
    return str(folder)


def test_fineweb_shards_are_used_where_they_lie(tmp_path) -> None:
    data = shards(tmp_path)
    corpus = prepare(data, vocab_size=500)
    train = np.concatenate([np.load(tmp_path / f"edufineweb_train_00000{i}.npy") for i in (1, 2)])
    np.testing.assert_array_equal(corpus.sources[0].train.read(0, 8000), train)
    np.testing.assert_array_equal(corpus.sources[0].val.read(0, 900), np.load(tmp_path / "edufineweb_val_000000.npy"))
    assert corpus.tokenizer is None
    assert [path.name for path in corpus.folder.iterdir()] == ["summary.json"]
    assert corpus.summary["trigram"] > 0


def test_a_shard_with_an_id_beyond_the_vocabulary_is_named(tmp_path) -> None:
    data = shards(tmp_path)
    np.save(tmp_path / "edufineweb_train_000002.npy", np.array([1, 500, 2], np.uint16))
    with pytest.raises(UserError, match=r"edufineweb_train_000002\.npy: token id 500, --vocab-size 500"):
        prepare(data, vocab_size=500)


def test_a_cache_that_cannot_be_written_is_named(tmp_path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="file"):
        prepare(jsonl(tmp_path / "a.jsonl", STORIES), cache_dir=tmp_path / "file" / "cache")


def test_documents_need_a_token(tmp_path) -> None:
    with pytest.raises(UserError, match=r"a\.jsonl.*too few"):
        prepare(jsonl(tmp_path / "a.jsonl", ["x"]), vocab_size=300)


def test_the_script_prints_the_next_command_and_one_line_for_an_error(tmp_path) -> None:
    data = jsonl(tmp_path / "a.jsonl", STORIES)
    done = subprocess.run(
        [sys.executable, SCRIPT, "--data", data, "--vocab-size", "400", "--text_column=text"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert f"mpirun -np 4 python scripts/train.py --data {data}" in done.stdout
    failed = subprocess.run(
        [sys.executable, SCRIPT, "--data", str(tmp_path / "a_b")], capture_output=True, text=True, timeout=60
    )
    assert failed.returncode == 2
    assert failed.stderr.count("\n") == 1
    assert "a_b" in failed.stderr


def test_nothing_of_a_folder_is_lost(tmp_path) -> None:
    (tmp_path / "texts").mkdir()
    for i, story in enumerate(STORIES[:100]):
        (tmp_path / "texts" / f"{i:03}.txt").write_text(story)
    corpus = prepare(str(tmp_path / "texts"), vocab_size=300)
    assert sorted(chain(*stories(corpus))) == sorted(documents(str(tmp_path / "texts"), ""))


def test_a_mixture_has_a_tokenizer_of_all_and_tells_of_each(tmp_path) -> None:
    """The small Hindi source counts as its share says, so that its words become tokens."""
    hindi = ["यह हिन्दी का एक वाक्य है। " * 3, "दूसरा वाक्य भी हिन्दी में है। " * 3, "और तीसरा यहाँ है। " * 3] * 4
    data = f"{jsonl(tmp_path / 'en.jsonl', STORIES)}=0.5,{jsonl(tmp_path / 'hi.jsonl', hindi)}=0.5"
    corpus = prepare(data, vocab_size=400)
    assert [source.weight for source in corpus.sources] == [0.5, 0.5]
    assert len(load_tokenizer(corpus.tokenizer).encode(" हिन्दी").ids) == 1
    english, indian = corpus.summary["sources"]
    assert [(Path(one["data"]).name, one["weight"]) for one in (english, indian)] == [
        ("en.jsonl", 0.5),
        ("hi.jsonl", 0.5),
    ]
    assert [english["documents"], indian["documents"]] == [400, 12]
    words = [sum(len(text.split()) for text in texts) for texts in (STORIES, hindi)]
    assert [english["words"], indian["words"]] == words
    pieces = 24  # few documents: each gives its end to validation
    tokens = [len(source.train) + len(source.val) for source in corpus.sources]
    assert english["tokens_per_word"] == pytest.approx((tokens[0] - 400) / words[0])
    assert (tokens[1] - pieces) / words[1] <= indian["tokens_per_word"] <= (tokens[1] - 12) / words[1]
    assert corpus.summary["tokens_per_word"] == pytest.approx(
        (english["tokens_per_word"] * words[0] + indian["tokens_per_word"] * words[1]) / sum(words)
    )
    assert corpus.summary["train_tokens"] == english["train_tokens"] + indian["train_tokens"]
    changed = prepare(data.replace("0.5,", "0.4,"), vocab_size=400)
    assert changed.folder != corpus.folder


def test_text_and_shards_mix_with_the_shards_tokenizer_only(tmp_path) -> None:
    (tmp_path / "shards").mkdir()
    data = f"{jsonl(tmp_path / 'a.jsonl', STORIES)}=1,{shards(tmp_path / 'shards')}=1"
    with pytest.raises(UserError, match="--tokenizer"):
        prepare(data, vocab_size=500)
    train_tokenizer(STORIES, 500).save(str(tmp_path / "t.json"))
    corpus = prepare(data, tokenizer_path=tmp_path / "t.json", vocab_size=500)
    assert len(corpus.sources[1].train) == 8000
    assert corpus.summary["documents"] is None
