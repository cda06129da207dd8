"""Distillation with train.py: the store of the teacher, a teacher that runs in each step, resumption, and errors."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from fira.metrics.csv_log import read_log
from tests.fira.training.small_runs import ONE, PP2_DP2_EP2, TRAIN, cache, errors, losses, train
from tests.launch import run_ranks

pytestmark = pytest.mark.slow

STUDENT = ["--objective", "distill", "--steps", 8, "--eval-every", 4, "--save-every", 4]
STUDENT += ["--model", "mooshak-tiny", "--model-set", "d_model=12,num_layers=3,n_head=2,n_kv_head=2,d_ff=8,tied=false"]


@pytest.fixture(scope="module")
def teacher(settings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("teacher") / "run"
    train(settings, 1, "--out", run, "--steps", 2)
    return run


def tokenizer(teacher: Path) -> Path:
    return next((teacher / "checkpoints").glob("step-*")) / "tokenizer.json"


@pytest.fixture(scope="module")
def student(settings: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("student") / "run"
    result = train(settings, 1, *ONE, *STUDENT, "--teacher", teacher, "--out", run)
    assert "cross-entropy" in result.stdout
    return run


def test_student_approaches_the_teacher(student: Path) -> None:
    log = read_log(student / "training_log.csv")
    assert log["train_loss"].iloc[-1] < log["train_loss"][0]
    assert log["cross_entropy"].notna().all()
    assert log["val_cross_entropy"].notna().sum() == 2


def test_run_is_resumed_on_another_layout_and_computes_only_what_it_reads(
    settings: Path, student: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(student, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "step-000008")
    written = np.load(run / "teacher" / "train-0-written.npy", mmap_mode="r+")
    assert written.sum() == 8 * 6
    written[:] = 0
    written.flush()
    (run / "teacher" / "val-0-written.npy").unlink()
    result = run_ranks(
        4, TRAIN, *PP2_DP2_EP2, "--ep", 1, "--out", run, "--resume", "auto", timeout=100, env=cache(settings)
    )
    assert result.returncode == 0, result.stderr
    np.testing.assert_array_equal(losses(run), losses(student))
    rows = np.load(run / "teacher" / "train-0-written.npy") == 1
    assert rows.sum() == 4 * 6
    for name, place in (("train-0-teacher_ids.npy", rows), ("val-0-teacher_logs.npy", slice(None))):
        one, other = (np.load(folder / "teacher" / name)[place] for folder in (run, student))
        np.testing.assert_array_equal(one, other)


def test_teacher_in_each_step_has_the_same_result(settings: Path, teacher: Path, student: Path, tmp_path: Path) -> None:
    flags = ["--teacher", teacher, "--tokenizer", tokenizer(teacher), "--teacher-online", "--pp", 2]
    train(settings, 2, *STUDENT, *flags, "--out", tmp_path / "run")
    np.testing.assert_array_equal(losses(tmp_path / "run"), losses(student))
    assert not (tmp_path / "run" / "teacher").exists()


def test_chats_are_distilled(settings: Path, teacher: Path, tmp_path: Path) -> None:
    chats = [{"prompt": f"{n}", "completion": f"{n + 1}"} for n in range(60)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    flags = ["--teacher", teacher, "--tokenizer", tokenizer(teacher), "--data", tmp_path / "chats.jsonl"]
    result = train(settings, 1, *ONE, *STUDENT, *flags, "--out", tmp_path / "run")
    assert "chats with" in result.stdout


def test_teacher_that_does_not_match_is_a_one_line_error(settings: Path, teacher: Path, tmp_path: Path) -> None:
    document = json.loads(tokenizer(teacher).read_text())
    ids = document["model"]["vocab"]
    first, second = list(ids)[50:52]
    ids[first], ids[second] = ids[second], ids[first]
    other = tmp_path / "tokenizer.json"
    other.write_text(json.dumps(document))
    own = ["--tokenizer", tokenizer(teacher)]
    cases: dict[str, list[object]] = {
        "--objective distill: no teacher": own,
        "missing: no checkpoint": [*own, "--teacher", "missing"],
        "a context of 16 tokens, the student has 32": [*own, "--teacher", teacher, "--seq-len", 32],
        "--teacher-top-k 301: the vocabulary has 300 tokens": [*own, "--teacher", teacher, "--teacher-top-k", 301],
        "another tokenizer": ["--teacher", teacher, "--tokenizer", other],
    }
    common = [*STUDENT, "--out", tmp_path / "run", "--pp", 2]
    found = errors(settings, 2, [[*common, *flags] for flags in cases.values()])
    for expected, message in zip(cases, found, strict=True):
        assert expected in message
