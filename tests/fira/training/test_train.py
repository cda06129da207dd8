"""scripts/train.py on several ranks: killed, resumed on other layouts, signalled, and with invalid arguments."""

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
PP4, PP2_DP2_EP2, ONE = ["--pp", 4], ["--pp", 2, "--dp", 2, "--ep", 2], []


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
    """Start a run on 4 ranks in the background, in a session of its own."""
    mpirun = Path(sys.executable).with_name("mpirun")
    command = [mpirun if mpirun.exists() else "mpirun", "-np", 4, sys.executable, TRAIN, "--config", settings, *flags]
    return subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, text=True, start_new_session=True, cwd=ROOT)


def wait_for(condition, process: subprocess.Popen[str], seconds: float = 100) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the run ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def kill_all(process: subprocess.Popen[str]) -> None:
    """Send SIGKILL to mpirun and all ranks."""
    subprocess.run(["pkill", "-KILL", "-s", str(process.pid)], check=False)
    process.wait(30)


def hashes(run: Path, step: int) -> dict[str, str]:
    """The SHA-256 of every file of weights and optimizer state of a checkpoint."""
    manifest = json.loads((run / "checkpoints" / f"step-{step:06d}" / "manifest.json").read_text())
    return {name: entry["sha256"] for name, entry in manifest["files"].items() if name.endswith(".safetensors")}


def losses(run: Path) -> np.ndarray:
    log = read_log(run / "training_log.csv")
    assert list(log["iter"]) == list(range(1, len(log) + 1))
    return log[["train_loss", "grad_norm", "aux_loss"]].to_numpy()


@pytest.fixture(scope="module")
def uninterrupted(settings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 steps on four stages without interruption."""
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
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


def test_run_folder_contents(uninterrupted):
    names = {path.name for path in uninterrupted.iterdir()}
    assert names == {"config.toml", "data.json", "training_log.csv", "training_progress.png", "checkpoints"}
    header = (uninterrupted / "training_log.csv").read_text().splitlines()[0]
    assert header.startswith("iter,train_loss,val_loss,lr,mfu,")
    assert (uninterrupted / "training_progress.png").read_bytes().startswith(b"\x89PNG")
    log = read_log(uninterrupted / "training_log.csv")
    assert log["val_loss"].notna().tolist() == [step in (10, 20) for step in range(1, 21)]
    assert log["train_loss"].iloc[-1] < log["train_loss"].iloc[0]
    assert log["mfu"].between(0, 1, inclusive="neither").all()


def test_trace_matches_the_schedule(uninterrupted):
    timeline = read_trace(uninterrupted.parent / "trace.json")
    assert (
        tuple(tuple(action for action, _, _ in spans) for spans in timeline.spans)
        == SCHEDULES["1f1b"].builder(4, 3).actions
    )
    for spans in timeline.spans:
        edges = [edge for _, start, end in spans for edge in (start, end)]
        assert edges == sorted(edges)
        assert 0 < edges[0] < edges[-1] < 60
    assert (uninterrupted.parent / "trace.png").read_bytes().startswith(b"\x89PNG")


def test_resume_on_the_same_layout_is_bitwise_identical(settings, uninterrupted, killed, tmp_path):
    run = copy(killed, tmp_path / "run")
    result = train(settings, 4, *PP4, "--out", run, "--resume", "auto")
    assert "resumed after step 10" in result.stdout
    assert (losses(run) == losses(uninterrupted)).all()
    assert hashes(run, 20) == hashes(uninterrupted, 20)


def test_resume_on_other_layouts_gives_equal_losses(settings, uninterrupted, killed, tmp_path):
    run = copy(killed, tmp_path / "run")
    process = start(settings, *PP2_DP2_EP2, "--out", run, "--resume", "auto", "--save-every", 15)
    wait_for((run / "checkpoints" / "step-000015").exists, process)
    kill_all(process)
    shutil.rmtree(run / "checkpoints" / "step-000020", ignore_errors=True)
    train(settings, 1, *ONE, "--out", run, "--resume", run / "checkpoints" / "step-000015")
    np.testing.assert_allclose(losses(run), losses(uninterrupted), rtol=1e-6)


def test_damaged_checkpoint_is_reported_and_the_previous_one_used(settings, uninterrupted, tmp_path):
    run = copy(uninterrupted, tmp_path / "run")
    damaged = sorted((run / "checkpoints" / "step-000020").glob("model-*.safetensors"))[0]
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    result = train(settings, 2, "--out", run, "--resume", "auto", "--steps", 11, "--plan", "auto")
    assert f"step-000020/{damaged.name}" in result.stderr
    assert "resumed after step 10" in result.stdout


@pytest.mark.parametrize(("number", "ends"), [(signal.SIGUSR1, False), (signal.SIGTERM, True)])
def test_signals_save_a_checkpoint(settings, tmp_path, number, ends):
    run = tmp_path / "run"
    process = start(settings, *PP2_DP2_EP2, "--out", run, "--steps", 3000, "--save-every", 3000, "--eval-every", 3000)
    try:
        wait_for((run / "training_log.csv").exists, process)
        wait_for(lambda: len(losses(run)) > 2, process)
        process.send_signal(number)  # mpirun forwards it to the ranks
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


def test_divergence_ends_all_ranks_before_the_update(settings, tmp_path):
    run = tmp_path / "run"
    result = train(settings, 4, *PP2_DP2_EP2, "--out", run, "--lr", 1e30, "--clip", 0, "--save-every", 1, status=2)
    lines = [line for line in result.stderr.splitlines() if line]
    assert len(lines) == 1
    assert "no weight was changed" in lines[0]
    assert "not finite" in lines[0] or "loss is" in lines[0]


def test_existing_run_is_not_overwritten(settings, uninterrupted):
    before = (uninterrupted / "training_log.csv").read_bytes()
    result = train(settings, 1, "--out", uninterrupted, status=2)
    assert "already contains a run" in result.stderr
    assert (uninterrupted / "training_log.csv").read_bytes() == before


INVALID_FLAGS = {
    "--pp 3": "choose pp × dp = 1",
    "--ep 3": "--ep 3 does not divide",
    "--no-such-flag": "unrecognized arguments: --no-such-flag",
    "--model fira-huge": "no such preset; choose from fira-base",
    "--model_set n_head=7": "not divisible by n_head 7",
    "--model-set colour=7": "fira-tiny has no field colour",
    "--model-set d_model": "give NAME=VALUE",
    "--model-set num_layers=2.5": "num_layers=2.5: num_layers must be int",
    "--model-set top_k=true": "top_k must be int or float",
    "--model mooshak-tiny --model-set norm_order=1": "norm_order must be str",
    "--model mooshak-tiny --model-set norm_order=side": "norm_order 'side' is neither",
    "--lr -1": "--lr -1.0: must be greater than 0",
    "--timeout 0": "--timeout 0.0: must be greater than 0",
    "--steps many": "invalid int value: 'many'",
    "--data no/such/file": "no/such/file",
    "--tokenizer setup.py": "setup.py: not a tokenizer.json",
    "--config setup.py": "setup.py is not TOML",
    "--resume tests": "tests: no checkpoint here",
    "--recompute some": "--recompute some: give none, full, auto, or a number",
    "--recompute 1 --local-devices cpu,cpu": "torchgpipe recomputes all or nothing",
    "--plan maybe": "invalid choice: 'maybe'",
    "--seq-len 100000": "--seq-len",
    "--local-devices gpu:x": "--local-devices gpu:x",
}


def test_invalid_layout_is_a_one_line_error_on_all_ranks(settings, tmp_path):
    result = train(settings, 4, "--out", tmp_path / "run", "--pp", 3, status=2)
    assert result.stderr.splitlines() == ["--pp 3 does not make 4 ranks; choose pp × dp = 4, or omit one of them"]
    assert not (tmp_path / "run").exists()


def test_invalid_flags_raise_one_line_errors(settings, tmp_path):
    flags = [["--config", str(settings), "--out", str(tmp_path / "run"), *words.split()] for words in INVALID_FLAGS]
    (messages,) = run_function(1, "tests.ranks.train_ranks", "messages", flags=flags)
    for message, (words, expected) in zip(messages, INVALID_FLAGS.items(), strict=True):
        assert "\n" not in message
        assert expected in message, words
    assert not (tmp_path / "run").exists()


def test_checkpoint_of_another_model_is_refused(settings, uninterrupted, tmp_path):
    resume = ["--resume", uninterrupted]
    result = train(settings, 1, "--out", tmp_path / "run", "--model-set", "d_model=32,n_head=2", *resume, status=2)
    assert "is of another model: its d_model is 16, this run's 32" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "blocks"), [("bf16", "full"), ("fp16", "auto")])
def test_lower_precision_gives_similar_losses(settings, uninterrupted, tmp_path, precision, blocks):
    run = tmp_path / "run"
    train(settings, 2, "--pp", 2, "--out", run, "--precision", precision, "--recompute", blocks, "--schedule", "gpipe")
    assert (losses(run) != losses(uninterrupted)).any()
    np.testing.assert_allclose(losses(run)[:, 0], losses(uninterrupted)[:, 0], rtol=0.02)
