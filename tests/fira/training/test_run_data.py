"""Data of train.py. Supervised fine-tuning: the loss of a plain loop over the chats, layouts, resumption and errors."""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer

from fira import load_model
from fira.data.loader import Loader
from fira.data.tokenizer import TOKENIZER
from fira.data.tokenizer_config import CHAT_TEMPLATE, TEMPLATE
from fira.generation.conversation import own_template
from fira.huggingface.export_model import export
from fira.models.fira import FiraConfig
from fira.models.registry import build
from fira.nn.context import Context
from fira.posttraining.chat_corpus import prepare_chats
from fira.training import run_data
from fira.training.config import TrainConfig
from pipeline.mpi import World
from tests.chats import BYTES, tokenizer_without_roles
from tests.fira.small_model import save
from tests.fira.training.small_runs import ONE, PP2_DP2_EP2, TRAIN, cache, errors, losses, train
from tests.launch import run_ranks

pytestmark = pytest.mark.slow

TUNING = ["--objective", "sft", "--seq-len", 64, "--eval-every", 4, "--save-every", 4, "--steps", 8, "--lr", 1e-3]
SMALL = FiraConfig(vocab_size=BYTES, seq_len=64, d_model=16, num_layers=4, d_ff=16, n_head=2, dropout=0.1)


def chat(number: int) -> list[dict[str, str]]:
    question = {"role": "user", "content": f"What follows {number}, and </s>?"}
    return [question, {"role": "assistant", "content": f"{number + 1}"}] * (1 + number % 3)


@pytest.fixture(scope="module")
def chats(settings: Path) -> Path:
    path = settings.parent / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": chat(number)}) + "\n" for number in range(80)))
    return path


@pytest.fixture(scope="module")
def base(settings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("base") / "run"
    train(settings, 1, "--out", out, "--seq-len", 64, "--steps", 1)
    return out


@pytest.fixture(scope="module")
def tuned(settings: Path, chats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from a model without tokens of the roles."""
    folder = tmp_path_factory.mktemp("tuned")
    older = save(folder / "older", build(SMALL), {TOKENIZER: tokenizer_without_roles().to_str().encode()})
    flags = ["--init", older, "--data", chats, *TUNING, "--vocab-size", BYTES, "--threads", 1]
    result = train(settings, 1, *ONE, *flags, "--out", folder / "run")
    assert "the vocabulary grows from 257 to 259 tokens" in result.stdout
    assert "76 chats with" in result.stdout
    return folder / "run"


def test_resumed_run_is_bitwise_identical_on_another_layout(settings: Path, tuned: Path, tmp_path: Path) -> None:
    run = shutil.copytree(tuned, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "step-000008")
    resumed = run_ranks(
        4, TRAIN, *PP2_DP2_EP2, "--out", run, "--resume", "auto", timeout=100, env=cache(settings)
    )  # with the settings in its folder
    assert resumed.returncode == 0, resumed.stderr
    np.testing.assert_array_equal(losses(run), losses(tuned))
    weights, expected = (load_model(folder).weights() for folder in (run, tuned))
    assert weights["layers.0.token.weight"].shape == (BYTES + 2, 16)
    assert all(torch.equal(value, expected[name]) for name, value in weights.items())
    assert losses(run)[-1, 0] < losses(run)[0, 0]


@torch.no_grad()
def test_first_loss_is_that_of_the_chats_one_by_one(settings: Path, base: Path, chats: Path, tmp_path: Path) -> None:
    """Without dropout; the mean over the trained tokens of the first batch."""
    changes = ["--model-set", "dropout=0", "--steps", 1]  # the last flag counts
    train(settings, 1, "--init", base, "--data", chats, *TUNING, *changes, "--out", tmp_path / "run")
    model = load_model(base)
    tokenizer = next((base / "checkpoints").glob("step-*")) / "tokenizer.json"
    corpus = prepare_chats(str(chats), tokenizer, 300, 64, cache(settings)["FIRA_CACHE"], progress=False)
    rows = Loader(corpus.sources[0].train, seed=42).batch(0, 6)
    total, count = 0.0, 0
    for tokens, targets, documents in zip(*map(torch.from_numpy, rows[:3]), strict=True):
        for number in range(int(documents.max()) + 1):
            logits = model(tokens[None, documents == number], Context())[0]
            total += float(F.cross_entropy(logits.double(), targets[documents == number], reduction="sum"))
            count += int((targets[documents == number] >= 0).sum())
    assert losses(tmp_path / "run")[0, 0] == pytest.approx(total / count, rel=1e-6)


def test_template_is_the_same_in_chat_and_export(base: Path, tmp_path: Path) -> None:
    model, messages = load_model(base), chat(1)
    folder = export(base, tmp_path / "exported")
    assert (folder / TEMPLATE).read_text() == CHAT_TEMPLATE
    exported = AutoTokenizer.from_pretrained(folder)
    ids = exported.apply_chat_template(messages, add_generation_prompt=True, sanitize_control_tokens=True)["input_ids"]
    for loaded in (model, load_model(folder)):
        assert own_template(loaded).prompt(messages) == ids


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": [{"content": "Hi"}]}, "line 2: messages, message 1: no role"),
        ({"prompt": "Hi", "completion": "x" * 300}, "line 2: answer of .* tokens"),
        (None, "no chats; give a file"),
    ],
)
def test_bad_data_end_with_one_line(
    settings: Path, base: Path, tmp_path: Path, record: dict[str, Any] | None, message: str
) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": chat(1)}) + "\n" + json.dumps(record) + "\n")
    data = ["--data", tmp_path / "a.jsonl"] if record else []
    run = ["--init", base, *data, "--objective", "sft", "--seq-len", 64, "--batch-size", 2, "--steps", 1]
    result = run_ranks(2, TRAIN, *run, "--out", tmp_path / "run", timeout=100, env=cache(settings))
    assert result.returncode == 2
    (line,) = filter(None, result.stderr.splitlines())
    assert re.search(message, line)


def test_run_with_a_document_mask_is_resumed_on_another_layout(settings: Path, tmp_path: Path) -> None:
    texts = "".join(json.dumps({"text": f"{i} and {i} is {2 * i}."}) + "\n" for i in range(400))
    (tmp_path / "a.jsonl").write_text(texts)
    flags = ["--data", tmp_path / "a.jsonl", "--seq-len", 64, "--threads", 1, "--save-every", 4, "--steps", 8]
    train(settings, 1, *flags, "--document-mask", "--out", tmp_path / "run")
    run = shutil.copytree(tmp_path / "run", tmp_path / "resumed")
    shutil.rmtree(run / "checkpoints" / "step-000008")
    resumed = run_ranks(4, TRAIN, *PP2_DP2_EP2, "--out", run, "--resume", "auto", timeout=100, env=cache(settings))
    assert resumed.returncode == 0, resumed.stderr
    np.testing.assert_array_equal(losses(run), losses(tmp_path / "run"))
    without = ["--no-document-mask", "--out", run, "--resume", "auto", "--steps", 9]
    assert "document_mask is True (here False)" in errors(settings, 1, [without])[0]


def test_document_mask_of_shards_requires_their_tokenizer(settings: Path, tmp_path: Path) -> None:
    for part in ("train", "val"):
        np.save(tmp_path / f"x_{part}_0.npy", np.arange(300, dtype=np.uint16))
    flags = ["--data", tmp_path, "--document-mask", "--out", tmp_path / "run"]
    assert "--document-mask: shards do not say" in errors(settings, 1, [flags])[0]


def test_data_are_prepared_on_the_cores_of_all_ranks_of_a_machine(monkeypatch) -> None:
    corpus, used = SimpleNamespace(folder=Path("prepared")), []
    gathered = iter(
        [[("a", {0, 1}), ("b", {7}), ("a", {3})], [("a", corpus.folder), ("b", corpus.folder), ("a", None)]]
    )

    @contextmanager
    def running_on(cores: set[int]) -> Iterator[None]:
        used.append(cores)
        yield

    monkeypatch.setattr(run_data.platform, "node", lambda: "a")
    monkeypatch.setattr(run_data, "gather", lambda value: next(gathered))
    monkeypatch.setattr(run_data, "running_on", running_on)
    monkeypatch.setattr(run_data, "prepare", lambda *arguments: corpus)
    assert run_data.load_corpus(TrainConfig(), None, SMALL, World(0, 3, 0, 2), quiet=True) is corpus
    assert used == [{0, 1, 3}]
