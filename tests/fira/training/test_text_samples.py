"""Text samples in training: the same on every layout, also after a resume; they change nothing else."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fira import load_model
from fira.decoding.decoding import continuation
from fira.decoding.sampling import Sampling
from fira.training.text_samples import LENGTH, TEMPERATURE
from tests.fira.training.small_runs import TRAIN, cache, errors, losses, train
from tests.launch import run_ranks

pytestmark = pytest.mark.slow

PROMPTS = ["def main(", "", "import os, sys and a prompt that is longer than the context of the model", "x"]
FLAGS = ["--steps", 4, "--save-every", 2, "--lr", 0.1, "--warmup", 0]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n")
    return path


@pytest.fixture(scope="module")
def sampled(settings: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on one rank with samples after steps 2 and 4."""
    out = tmp_path_factory.mktemp("sampled") / "run"
    train(settings, 1, *FLAGS, "--sample-prompts", prompts, "--sample-every", 2, "--out", out)
    return out


def samples(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


def test_samples_are_those_of_the_checkpoint(sampled: Path) -> None:
    found = samples(sampled)
    assert [(sample["step"], sample["prompt"]) for sample in found] == [
        (step, prompt) for step in (2, 4) for prompt in PROMPTS if prompt
    ]
    for step in (2, 4):
        model = load_model(sampled / "checkpoints" / f"step-{step:06d}")
        rows = [sample for sample in found if sample["step"] == step]
        prompts = [model.tokenizer.encode(row["prompt"]).ids[-16:] for row in rows]
        new: list[list[int]] = [[] for _ in rows]
        for tokens in continuation(model, prompts, LENGTH, Sampling(temperature=TEMPERATURE, seed=0)):
            for row, token in tokens.items():
                new[row].append(token)
        assert [row["text"] for row in rows] == model.tokenizer.decode_batch(new)


def test_training_is_bitwise_identical_without_samples(settings: Path, sampled: Path, tmp_path: Path) -> None:
    train(settings, 1, *FLAGS, "--out", tmp_path / "run")
    assert (losses(tmp_path / "run") == losses(sampled)).all()
    names = [path.name for path in (sampled / "checkpoints" / "step-000004").glob("*.safetensors")]
    for name in names:
        one, other = (run / "checkpoints" / "step-000004" / name for run in (sampled, tmp_path / "run"))
        assert one.read_bytes() == other.read_bytes()
    assert names


def test_samples_do_not_depend_on_the_layout_also_after_a_resume(settings: Path, sampled: Path, tmp_path: Path) -> None:
    """The prompts are in the run's config.toml."""
    run = shutil.copytree(sampled, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "step-000004")
    flags = ["--pp", 2, "--dp", 2, "--ep", 2, "--out", run, "--resume", "auto"]
    result = run_ranks(4, TRAIN, *flags, timeout=100, env=cache(settings))
    assert "resumed after step 2" in result.stdout, result.stderr
    assert (run / "samples.jsonl").read_bytes() == (sampled / "samples.jsonl").read_bytes()


def test_invalid_prompts_are_errors(settings: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes("Grüße\n".encode("latin-1"))
    cases = {
        "nowhere.txt: no such file": ["--sample-prompts", tmp_path / "nowhere.txt"],
        "empty.txt: the file is empty; write a prompt per line": ["--sample-prompts", tmp_path / "empty.txt"],
        "latin.txt: not text in UTF-8": ["--sample-prompts", tmp_path / "latin.txt"],
        "--sample-every: no prompts; give": ["--sample-every", 3],
        "--track comet: no such tracker; choose from": ["--track", "comet"],
    }
    commands = [[*flags, "--out", tmp_path / "run"] for flags in cases.values()]
    for expected, message in zip(cases, errors(settings, 2, commands), strict=True):
        assert expected in message
