"""GRPO and on-policy distillation with train.py: what is learned, resumption on another layout, and errors."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from fira.metrics.csv_log import read_log
from tests.fira.training.small_runs import ONE, TRAIN, cache, losses, train
from tests.launch import run_ranks

pytestmark = pytest.mark.slow

GRPO = ["--objective", "grpo", "--group-size", 6, "--batch-size", 12, "--lr", 1e-2, "--seq-len", 16]
GRPO += ["--steps", 30, "--eval-every", 10, "--save-every", 10, "--min-lr", 1e-2, "--warmup", 0]
PP2_DP2 = ["--pp", 2, "--dp", 2]


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts that are answered by "a"."""
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{n}", "completion": "so a"}) + "\n" for n in range(60)))
    return path


@pytest.fixture(scope="module")
def model(settings: Path, chats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Has learned to answer with one of two letters."""
    folder = tmp_path_factory.mktemp("model")
    both = [{"prompt": f"{n}", "completion": f"so {'ab'[n % 2]}"} for n in range(200)]
    (folder / "both.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in both))
    train(settings, 1, "--out", folder / "base", "--steps", 2)
    flags = ["--objective", "sft", "--data", folder / "both.jsonl", "--steps", 60, "--lr", 1e-2]
    train(settings, 1, "--init", folder / "base", *flags, "--out", folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def run(settings: Path, chats: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("grpo") / "run"
    train(settings, 1, *ONE, *GRPO, "--init", model, "--data", chats, "--answer-after", "so ", "--out", out)
    return out


def test_rewarded_answers_become_more_frequent(run: Path) -> None:
    log = read_log(run / "training_log.csv")
    assert log["train_loss"][:3].mean() > 0.3
    assert log["train_loss"][-3:].mean() < 0.1
    assert log["val_loss"].iloc[-1] < 0.2
    assert log["entropy"].iloc[-1] < log["entropy"][0]
    assert (log["answer_tokens"] >= 1).all()


def test_run_is_resumed_on_another_layout(settings: Path, run: Path, tmp_path: Path) -> None:
    other = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(other / "checkpoints" / "step-000030")
    result = run_ranks(4, TRAIN, *PP2_DP2, "--out", other, "--resume", "auto", timeout=100, env=cache(settings))
    assert result.returncode == 0, result.stderr
    np.testing.assert_array_equal(losses(other), losses(run))


def test_student_is_taught_on_its_own_answers(settings: Path, chats: Path, model: Path, tmp_path: Path) -> None:
    flags = ["--objective", "distill", "--teacher", model, "--teacher-online", "--on-policy", 0.5, "--data", chats]
    flags += ["--model", "mooshak-tiny", "--model-set", "d_model=12,num_layers=3,n_head=2,n_kv_head=2,d_ff=8"]
    flags += ["--steps", 6, "--eval-every", 3, "--save-every", 6]
    train(settings, 1, *ONE, *flags, "--out", tmp_path / "one")
    train(settings, 2, "--pp", 2, *flags, "--out", tmp_path / "two")
    np.testing.assert_array_equal(losses(tmp_path / "one"), losses(tmp_path / "two"))
    train(settings, 1, *ONE, *flags, "--on-policy", 0, "--out", tmp_path / "off")
    assert (losses(tmp_path / "one") != losses(tmp_path / "off")).any()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([*GRPO, "--answer-after", "thus"], "--answer-after 'thus': the answer 'so a' of the data does not contain it"),
        ([*GRPO, "--group-size", 5], "--group-size 5: does not divide the batch of 12 sequences"),
        (["--objective", "distill", "--teacher", "MODEL", "--on-policy", 1], "add --teacher-online"),
        (
            ["--objective", "distill", "--teacher", "MODEL", "--teacher-online", "--on-policy", 1, "--data", "TEXT"],
            "--on-policy 1.0: the data are texts without prompts",
        ),
    ],
)
def test_invalid_settings_are_a_one_line_error(
    settings: Path, chats: Path, model: Path, tmp_path: Path, flags: list[object], message: str
) -> None:
    (tmp_path / "text.txt").write_text("A text. " * 500)
    names = {"MODEL": model, "TEXT": tmp_path / "text.txt"}
    given = [names.get(str(flag), flag) for flag in flags]
    result = train(settings, 2, "--init", model, "--data", chats, *given, "--out", tmp_path / "run", status=2)
    assert any(message in line for line in result.stderr.splitlines()), result.stderr
    assert "Traceback" not in result.stderr
