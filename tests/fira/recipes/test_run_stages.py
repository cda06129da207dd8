"""A recipe runs, skips what is unchanged, and continues after a kill with the result of an undisturbed run."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fira.errors import UserError
from fira.recipes.recipe_file import read_recipe
from fira.recipes.run_stages import Commands, run_stages
from pipeline.mpi import World
from tests.fira.recipes.small_recipe import STAGES, write_recipe
from tests.launch import ROOT, inherited, members, mpirun

LIMIT_S = 120


def start(folder: Path, ranks: int) -> "subprocess.Popen[str]":
    """Start the recipe in a folder, in a session of its own."""
    launcher = [mpirun(), "-np", str(ranks)] if ranks > 1 else []
    command = [*launcher, sys.executable, str(ROOT / "scripts" / "recipe.py"), "small.toml"]
    environment = inherited() | {"FIRA_CACHE": str(folder / "cache")}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, **pipes)  # type: ignore[call-overload]


def end(process: "subprocess.Popen[str]") -> str:
    """Wait for the end of a job, and return its output. No process of it survives."""
    try:
        return process.communicate(timeout=LIMIT_S)[0]
    finally:
        kill(process)


def kill(process: "subprocess.Popen[str]") -> None:
    """Kill all processes of a job with SIGKILL."""
    while found := members(process.pid):
        for pid in found:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.05)
    process.wait()


def run(folder: Path, ranks: int = 1) -> str:
    process = start(folder, ranks)
    output = end(process)
    assert process.returncode == 0, output
    return output


def ran(output: str) -> list[str]:
    """The stages that were run."""
    return re.findall(r"^\[\d/\d\] (\w+): took", output, re.M)


def weights(folder: Path, stage: str) -> dict[str, bytes]:
    """The weights of a stage's last checkpoint, of which every pipeline stage has written its own file."""
    files = (folder / "out" / stage / "checkpoints" / "step-000004").glob("model-*.safetensors")
    return {name: tensor.numpy().tobytes() for file in files for name, tensor in load_file(file).items()}


def wait_until(condition: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert process.poll() is None, "the job has ended before"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def processes_in(folder: Path, word: bytes = b"") -> list[int]:
    """The running processes with this current folder, also of other sessions, and a word in their command line."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if (entry / "cwd").readlink() == folder and word in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # the process has ended in the meantime
    return sorted(found)


WRITE = "import pathlib, sys; pathlib.Path(sys.argv[-1].removeprefix('--out=')).write_text(' '.join(sys.argv[1:-1]))"


def run_with(path: Path, program: str, train: Callable[[Sequence[str]], None]) -> bool:
    """Run the stages of a recipe on one rank, in this process, with a program and a function instead of commands."""
    recipe = read_recipe(path, str(path.parent / "out"), lambda command, arguments: None)
    commands = Commands(train, [sys.executable, "-S", "-c", program], [])
    return run_stages(recipe, World(0, 1, 0, 1), commands)


def finish(arguments: Sequence[str]) -> None:
    """A training run that ends in its last step, and changes what a run changes."""
    torch.set_num_threads(torch.get_num_threads() + 1)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (out,) = [Path(word.removeprefix("--out=")) for word in arguments if word.startswith("--out=")]
    out.mkdir(exist_ok=True)
    (out / "arguments").write_text(" ".join(arguments))
    (out / "finished.json").touch()


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe of a training run and another command."""
    monkeypatch.setenv("FIRA_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "r.toml"
    path.write_text('[stages.a]\ncommand = "train"\nsteps = 3\n[stages.b]\ncommand = "x"\ncheckpoint = "{a}"\n')
    return path


def test_each_stage_is_run_once(path):
    calls = []
    threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGTERM)
    assert run_with(path, WRITE, lambda words: (calls.append(list(words)), finish(words))[0])
    assert run_with(path, WRITE, lambda words: calls.append([]))
    assert calls == [["--steps=3", f"--out={path.parent}/out/a"]]
    assert (path.parent / "out" / "b").read_text() == f"x --checkpoint={path.parent}/out/a"
    assert (torch.get_num_threads(), signal.getsignal(signal.SIGTERM)) == (threads, handler)


def test_a_training_run_that_a_signal_ended_is_resumed(path):
    calls = []
    assert not run_with(path, WRITE, lambda words: calls.append(words[-1]))
    assert not (path.parent / "out" / "b").exists()
    assert run_with(path, WRITE, lambda words: (calls.append(words[-1]), finish(words))[0])
    assert calls == [f"--out={path.parent}/out/a", "--resume=auto"]


@pytest.mark.parametrize(
    ("program", "cause"),
    [("raise SystemExit(3)", "status 3"), ("import os; os.kill(os.getpid(), 9)", "signal 9"), ("", "b was removed")],
)
def test_a_stage_that_fails_ends_the_recipe_with_one_line_and_is_run_again(path, program, cause):
    calls = []
    for _ in range(2):
        with pytest.raises(UserError, match=f"stage b: .*{cause}"):
            run_with(path, program, lambda words: (calls.append(words), finish(words))[0])
    assert len(calls) == 1
    assert run_with(path, WRITE, finish)


@pytest.mark.slow
def test_all_stages_on_two_ranks_and_changes(tmp_path):
    write_recipe(tmp_path)
    output = run(tmp_path, 2)
    assert ran(output) == list(STAGES)
    assert output.splitlines()[-1] == "next: python scripts/chat.py --checkpoint out/preferred"
    report = (tmp_path / "out" / "report.html").read_text()
    assert "A &lt;small&gt; recipe" in report
    assert "DPO &lt;1&gt;" in report
    assert "&lt;2&gt;" in report  # a right answer
    assert report.count("<svg") == 6  # curves and experts of three runs
    assert not re.search(r"(?:src|href|url)\s*[=(]\s*[\"']?(?!#)\w+:", report)  # nothing is loaded
    assert ran(run(tmp_path, 2)) == []
    changed = STAGES | {"preferred": STAGES["preferred"].replace("steps = 4", "steps = 4\ndpo_beta = 0.2")}
    write_recipe(tmp_path, changed)
    assert ran(run(tmp_path)) == ["preferred", "scores", "exported"]
    assert (tmp_path / "out" / "preferred.old").is_dir()


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_kill_in_each_kind_of_stage_does_not_change_the_result(tmp_path):
    """SIGKILL of one of two ranks, which ends the job and the child process of a stage."""
    write_recipe(tmp_path / "calm")
    run(tmp_path / "calm")
    folder, killed = tmp_path / "killed", []
    write_recipe(folder)
    for number, (stage, sign) in enumerate(
        (
            ("tokens", "stages/tokens.json"),
            ("base", "base/checkpoints/step-000002"),
            ("chat", "chat/checkpoints/step-000001"),
            ("preferred", "preferred/checkpoints/step-000003"),
            ("scores", "stages/scores.json"),
            ("exported", "stages/exported.json"),
        )
    ):
        process = start(folder, 2)
        wait_until((folder / "out" / sign).exists, process)
        ranks = [pid for pid in processes_in(folder, b"recipe.py") if pid != process.pid]
        os.kill(ranks[number % 2], signal.SIGKILL)
        assert process.wait(LIMIT_S)
        deadline = time.monotonic() + 10
        while processes_in(folder) and time.monotonic() < deadline:  # a child process ends with rank 0
            time.sleep(0.02)
        assert not processes_in(folder)
        killed.append(stage)
    output = run(folder)
    assert "exported" in ran(output)
    assert killed == list(STAGES)
    for stage in ("base", "chat", "preferred"):
        assert weights(folder, stage) == weights(tmp_path / "calm", stage)
    for file in ("scores/evaluation.json", "exported/model.safetensors", "tokens/tokenizer.json"):
        contents = [(place / "out" / file).read_text("latin-1") for place in (folder, tmp_path / "calm")]
        assert contents[0].replace("killed", "calm") == contents[1]


@pytest.mark.slow
def test_a_failing_stage_ends_all_ranks_with_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    write_recipe(tmp_path, {"tokens": 'command = "prepare"\ndata = "empty/"'})
    process = start(tmp_path, 2)
    lines = end(process).splitlines()
    assert process.returncode == 2
    assert (
        lines[-1] == "stage tokens: fira prepare ended with status 2; correct it, and the same command continues here"
    )
    assert "empty: no text in this folder" in lines[-2]
