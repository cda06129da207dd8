"""scripts/train.py as a user runs it: killed, resumed on other layouts, signalled, and given what it cannot use."""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fira.metrics.csv_log import read_log
from pipeline.schedule import SCHEDULES
from pipeline.timeline import read_trace
from tests.launch import ROOT, run_function, run_ranks

TRAIN = ROOT / "scripts" / "train.py"
SETTINGS = """
model_set = "d_model=16,num_layers=4,d_ff=16,n_head=2,dropout=0.1"
vocab_size = 300
seq-len = 16
batch_size = 6
micro_batch_size = 2
steps = 20
eval_every = 10
eval_sequences = 8
save_every = 10
keep = 5
"""
PP4, SPREAD, ONE = ["--pp", 4], ["--pp", 2, "--dp", 2, "--ep", 2], []


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A --config file for a model that trains in seconds on one file of the standard library."""
    folder = tmp_path_factory.mktemp("settings")
    shutil.copy(argparse.__file__, folder / "text.txt")
    path = folder / "settings.toml"
    path.write_text(SETTINGS + f'data = "{folder / "text.txt"}"\n')
    os.environ["FIRA_CACHE"] = str(folder / "cache")
    yield path
    del os.environ["FIRA_CACHE"]


def train(settings: Path, ranks: int, *flags: object, status: int = 0) -> subprocess.CompletedProcess[str]:
    result = run_ranks(ranks, TRAIN, "--config", settings, *flags, timeout=120)
    assert result.returncode == status, result.stdout + result.stderr
    return result


def start(settings: Path, *flags: object) -> subprocess.Popen[str]:
    """The same on 4 ranks, in the background; its process group is its own."""
    mpirun = Path(sys.executable).with_name("mpirun")
    command = [mpirun if mpirun.exists() else "mpirun", "-np", 4, sys.executable, TRAIN, "--config", settings, *flags]
    return subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, text=True, start_new_session=True, cwd=ROOT)


def wait_for(condition, process: subprocess.Popen[str], seconds: float = 100) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the run ended before it could be disturbed"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def kill_all(process: subprocess.Popen[str]) -> None:
    """SIGKILL for mpirun and every rank at once."""
    subprocess.run(["pkill", "-KILL", "-s", str(process.pid)], check=False)
    process.wait(30)


def hashes(run: Path, step: int) -> dict[str, str]:
    """The SHA-256 of everything a checkpoint says of model and optimizer."""
    manifest = json.loads((run / "checkpoints" / f"step-{step:06d}" / "manifest.json").read_text())
    return {name: entry["sha256"] for name, entry in manifest["files"].items() if name.endswith(".safetensors")}


def losses(run: Path) -> np.ndarray:
    log = read_log(run / "training_log.csv")
    assert list(log["iter"]) == list(range(1, len(log) + 1))
    return log[["train_loss", "grad_norm", "aux_loss"]].to_numpy()


@pytest.fixture(scope="module")
def whole(settings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 steps on four stages without a disturbance."""
    out = tmp_path_factory.mktemp("whole") / "run"
    result = train(settings, 4, *PP4, "--out", out, "--trace", out.parent / "trace.json")
    assert "next: python scripts/generate.py --checkpoint" in result.stdout
    return out


@pytest.fixture(scope="module")
def killed(settings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, killed by SIGKILL after its checkpoint of step 10."""
    out = tmp_path_factory.mktemp("killed") / "run"
    process = start(settings, *PP4, "--out", out)
    wait_for((out / "checkpoints" / "latest").exists, process)
    kill_all(process)
    assert not (out / "checkpoints" / "step-000020").exists()
    return out


def copy(run: Path, to: Path) -> Path:
    shutil.copytree(run, to)
    return to


def test_a_run_leaves_its_folder(whole):
    names = {path.name for path in whole.iterdir()}
    assert names == {"config.toml", "data.json", "training_log.csv", "training_progress.png", "checkpoints"}
    header = (whole / "training_log.csv").read_text().splitlines()[0]
    assert header.startswith("iter,train_loss,val_loss,lr,mfu,")
    assert (whole / "training_progress.png").read_bytes().startswith(b"\x89PNG")
    log = read_log(whole / "training_log.csv")
    assert log["val_loss"].notna().tolist() == [step in (10, 20) for step in range(1, 21)]
    assert log["train_loss"].iloc[-1] < log["train_loss"].iloc[0]
    assert log["mfu"].between(0, 1, inclusive="neither").all()


def test_a_trace_tells_what_every_rank_did(whole):
    timeline = read_trace(whole.parent / "trace.json")
    schedule = SCHEDULES["1f1b"].builder(4, 3)
    assert tuple(tuple(action for action, _, _ in spans) for spans in timeline.spans) == schedule.actions
    for spans in timeline.spans:
        edges = [edge for _, start, end in spans for edge in (start, end)]
        assert edges == sorted(edges)
        assert 0 < edges[0] < edges[-1] < 60
    assert (whole.parent / "trace.png").read_bytes().startswith(b"\x89PNG")


def test_resumed_on_the_same_layout_it_is_bit_equal(settings, whole, killed, tmp_path):
    run = copy(killed, tmp_path / "run")
    result = train(settings, 4, *PP4, "--out", run, "--resume", "auto")
    assert "resumed after step 10" in result.stdout
    assert (losses(run) == losses(whole)).all()
    assert hashes(run, 20) == hashes(whole, 20)


def test_resumed_on_other_layouts_it_is_the_same_run(settings, whole, killed, tmp_path):
    run = copy(killed, tmp_path / "run")
    process = start(settings, *SPREAD, "--out", run, "--resume", "auto", "--save-every", 15)
    wait_for((run / "checkpoints" / "step-000015").exists, process)
    kill_all(process)
    shutil.rmtree(run / "checkpoints" / "step-000020", ignore_errors=True)
    train(settings, 1, *ONE, "--out", run, "--resume", run / "checkpoints" / "step-000015")
    np.testing.assert_allclose(losses(run), losses(whole), rtol=1e-6)


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(settings, whole, tmp_path):
    run = copy(whole, tmp_path / "run")
    damaged = sorted((run / "checkpoints" / "step-000020").glob("model-*.safetensors"))[0]
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    result = train(settings, 2, "--out", run, "--resume", "auto", "--steps", 11, "--plan", "auto")
    assert f"step-000020/{damaged.name}" in result.stderr
    assert "resumed after step 10" in result.stdout


@pytest.mark.parametrize(("number", "ends"), [(signal.SIGUSR1, False), (signal.SIGTERM, True)])
def test_signals_save(settings, tmp_path, number, ends):
    run = tmp_path / "run"
    process = start(settings, *SPREAD, "--out", run, "--steps", 3000, "--save-every", 3000, "--eval-every", 3000)
    try:
        wait_for((run / "training_log.csv").exists, process)
        wait_for(lambda: len(losses(run)) > 2, process)
        process.send_signal(number)  # mpirun hands it on to the ranks
        wait_for(lambda: (run / "checkpoints" / "latest").exists() or process.poll() == 0, process)
        if ends:
            assert process.wait(60) == 0
            assert "stopped by a signal" in process.stdout.read()
        else:
            saved = len(losses(run))
            wait_for(lambda: len(losses(run)) > saved, process)
    finally:
        kill_all(process)
    assert (run / "checkpoints" / "latest").exists()


def test_divergence_stops_all_ranks_and_poisons_nothing(settings, tmp_path):
    run = tmp_path / "run"
    result = train(settings, 4, *SPREAD, "--out", run, "--lr", 1e30, "--clip", 0, "--save-every", 1, status=2)
    lines = [line for line in result.stderr.splitlines() if line]
    assert len(lines) == 1
    assert "no weight was changed" in lines[0]
    assert "not finite" in lines[0] or "loss is" in lines[0]


def test_a_folder_that_holds_a_run_is_not_overwritten(settings, whole):
    before = (whole / "training_log.csv").read_bytes()
    result = train(settings, 1, "--out", whole, status=2)
    assert "already holds a run" in result.stderr
    assert (whole / "training_log.csv").read_bytes() == before


MISTAKES = {
    "--pp 3": "choose pp × dp = 1",
    "--ep 3": "--ep 3 does not divide",
    "--no-such-flag": "unrecognized arguments: --no-such-flag",
    "--model fira-huge": "no such preset; choose from fira-base",
    "--model_set n_head=7": "not divisible by n_head 7",
    "--model-set colour=7": "fira-tiny has no colour",
    "--model-set d_model": "give NAME=VALUE",
    "--model-set num_layers=2.5": "num_layers=2.5: num_layers is int",
    "--model-set top_k=true": "top_k is int or float",
    "--model mooshak-tiny --model-set norm_order=1": "norm_order is str",
    "--model mooshak-tiny --model-set norm_order=side": "norm_order 'side' is neither",
    "--lr -1": "--lr -1.0: must be greater than 0",
    "--timeout 0": "--timeout 0.0: must be greater than 0",
    "--steps many": "invalid int value: 'many'",
    "--data no/such/file": "no/such/file",
    "--tokenizer setup.py": "setup.py: not a tokenizer.json",
    "--config setup.py": "setup.py is not TOML",
    "--resume tests": "tests: no checkpoint here",
    "--recompute some": "--recompute some: give none, full, auto, or how many",
    "--recompute 1 --local-devices cpu,cpu": "torchgpipe recomputes all or nothing",
    "--plan maybe": "invalid choice: 'maybe'",
    "--seq-len 100000": "--seq-len",
    "--local-devices gpu:x": "--local-devices gpu:x",
}


def test_a_mistake_is_one_line_and_status_2_on_every_rank(settings, tmp_path):
    result = train(settings, 4, "--out", tmp_path / "run", "--pp", 3, status=2)
    assert result.stderr.splitlines() == ["--pp 3 does not make 4 ranks; choose pp × dp = 4, or omit one of them"]
    assert not (tmp_path / "run").exists()


def test_every_mistake_says_what_and_where(settings, tmp_path):
    flags = [["--config", str(settings), "--out", str(tmp_path / "run"), *words.split()] for words in MISTAKES]
    (messages,) = run_function(1, "tests.ranks.train_ranks", "messages", flags=flags)
    for message, (words, expected) in zip(messages, MISTAKES.items(), strict=True):
        assert "\n" not in message
        assert expected in message, words
    assert not (tmp_path / "run").exists()


def test_another_models_checkpoint_is_refused(settings, whole, tmp_path):
    resume = ["--resume", whole]
    result = train(settings, 1, "--out", tmp_path / "run", "--model-set", "d_model=32,n_head=2", *resume, status=2)
    assert "is of another model: its d_model is 16, this run's 32" in result.stderr


@pytest.mark.parametrize(("precision", "blocks"), [("bf16", "full"), ("fp16", "auto")])
def test_lower_precision_learns_the_same(settings, whole, tmp_path, precision, blocks):
    run = tmp_path / "run"
    train(settings, 2, "--pp", 2, "--out", run, "--precision", precision, "--recompute", blocks, "--schedule", "gpipe")
    assert (losses(run) != losses(whole)).any()
    np.testing.assert_allclose(losses(run)[:, 0], losses(whole)[:, 0], rtol=0.02)
