"""The documentation builds, every command that it shows is run or excluded with a reason, and quoted messages exist."""

import ast
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tests.launch import ROOT
from tests.project.commands import SETUP, blocks, commands, make_checkout, run, run_python, shortened, table_commands

PAGES = {path.stem: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
PAGES |= {"contributing": (ROOT / "CONTRIBUTING.md").read_text()}

# Commands that no test runs, by a part of the command, and the reason. Their flags are compared with --help.
NOT_RUN = {
    "pip install -q -r requirements.txt && mpirun -np 4 python scripts/train.py": "test_readme.py runs it",
    "pip install -q -r requirements.txt": "creates a new virtual environment from the network",
    "pip install -q -e '.[gguf]'": "installs packages from the network",
    "--model fira-base --data": "trains 333 million parameters on data that must be downloaded",
    "fineweb-edu:sample-10BT": "downloads files; tests/fira/data/test_hub_datasets.py reads local ones",
    "--tasks hellaswag": "lm-eval downloads the tasks; tests/fira/huggingface/test_tasks.py runs local tasks",
    "--tokenizer o200k_base": "downloads the ranks of tiktoken; tests/fira/data/test_tiktoken_tokenizer.py has others",
    "deepspeed --num_gpus=4": "needs four GPUs; tests/integration/test_launcher_runs.py starts two ranks on CPUs",
    "train.py --compile": "compiles for minutes; tests/fira/parallel/test_compile_blocks.py compiles all families",
    "serve.py --checkpoint": "runs until a signal; tests/fira/commands/test_serve.py runs it",
    "watch.py runs": "runs until Ctrl-C; tests/integration/test_watch_page.py opens the page",
    "recipe.py recipes/": "takes up to days; tests/fira/recipes runs small ones, and parses these",
    "doctor.py --gpu": "needs a GPU; tests/fira/doctor runs the tests on the CPU",
    "tests.platforms.run": "creates environments of 8 GB from the network",
    "git worktree add before main": "needs a second checkout; its three following lines depend on it",
    "for tree in before": "compares two checkouts",
    "do diff <(cut": "compares two checkouts",
    "(cd compare/before/run": "compares two checkouts",
}
# Runs that a page expects, beyond that of fira-tiny, which all pages expect.
PREPARED = {
    "coming-from": ["python scripts/train.py --model rish-tiny"],
    "gguf": ["mpirun -np 2 python scripts/train.py --model mooshak-tiny"],
    "huggingface": ["mpirun -np 2 python scripts/train.py --model mooshak-tiny"],
    "training": ["mpirun -np 2 python scripts/train.py"],
}


def not_run(command: str) -> bool:
    return any(part in command for part in NOT_RUN)


def runnable(page: str) -> list[str]:
    return [command for command in commands(PAGES[page]) if not not_run(command)]


def planned(command: str, page: str) -> str:
    """The command, in which only the planner's page measures layouts, as do the tests of the README."""
    return command + " --plan none" * ("train.py" in command and "--plan" not in command and page != "planner")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with a run of fira-tiny of two steps."""
    place = make_checkout(tmp_path_factory.mktemp("docs"))
    run(shortened("mpirun -np 2 python scripts/train.py"), place)
    return place


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", [page for page in PAGES if runnable(page) or blocks(PAGES[page], "python")])
def test_commands_and_code_of_a_page(trained: Path, tmp_path: Path, page: str):
    """All commands of a page run in its order, then its Python blocks, in a copy of the trained checkout."""
    place = tmp_path / "checkout"
    shutil.copytree(trained, place, symlinks=True)
    for title, content in re.findall(r'^```toml title="(\S+)"\n(.*?)^```', PAGES[page], re.S | re.M):
        (place / title).write_text(content)
    for command in PREPARED.get(page, []) + runnable(page):
        run(planned(shortened(command), page), place, stdin="/quit\n" if "chat.py" in command else "")
    for code in blocks(PAGES[page], "python"):
        run_python(code, place)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_commands_in_tables(trained: Path, tmp_path: Path):
    """With the small preset of a family, and a folder of this test instead of Kaggle's."""
    place, kaggle = tmp_path / "checkout", tmp_path / "kaggle"
    shutil.copytree(trained, place, symlinks=True)
    kaggle.mkdir()
    shutil.copy(next(trained.glob("runs/fira-tiny/checkpoints/*/tokenizer.json")), kaggle)
    for name in ("train", "val"):
        np.save(kaggle / f"x_{name}_1.npy", np.arange(5000, dtype=np.uint16) % 300)
    for command in table_commands(PAGES["coming-from"]):
        small = command.replace("-base ", "-tiny ").replace("/kaggle/input", str(kaggle))
        if not not_run(small):
            run(planned(shortened(small), "coming-from"), place)


def help_of(script: str) -> str:
    command = [sys.executable, ROOT / script, "--help"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.replace("[", "  ")


@pytest.mark.slow
def test_every_flag_in_a_command_exists():
    shown = [command for text in PAGES.values() for command in commands(text) + table_commands(text)]
    used = [(script, command) for command in shown for script in re.findall(r"scripts/\w+\.py", command)]
    scripts = sorted({script for script, _ in used})
    with ThreadPoolExecutor(2) as pool:
        helps = dict(zip(scripts, pool.map(help_of, scripts), strict=True))
    for script, command in used:
        for word in shlex.split(command.split(script)[1].split(";")[0]):
            flag = word.partition("=")[0].replace("_", "-")
            assert not word.startswith("--") or re.search(rf" {flag}[ ,\n]", helps[script]), (word, command)


def test_every_excluded_command_is_still_shown():
    shown = [command for text in PAGES.values() for command in commands(text) + table_commands(text)]
    assert all(any(part in command for command in shown) for part in NOT_RUN)
    assert all(command.startswith(SETUP.removesuffix(" && ")) for command in shown if "-m venv" in command)


def message_patterns() -> list[re.Pattern[str]]:
    """A pattern for every string of the source that has 20 constant characters or more; fields match anything."""
    patterns = []
    for path in [*ROOT.glob("fira/**/*.py"), *ROOT.glob("pipeline/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [str(part.value) if isinstance(part, ast.Constant) else None for part in node.values]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                parts = [node.value]
            else:
                continue
            if sum(len(part or "") for part in parts) >= 20:
                patterns.append(re.compile("".join(".*" if part is None else re.escape(part) for part in parts)))
    return patterns


def test_quoted_messages_are_in_the_source():
    patterns = message_patterns()
    messages = [line for block in blocks(PAGES["troubleshooting"], "text") for line in block.splitlines()]
    assert len(messages) >= 20
    missing = [message for message in messages if not any(pattern.fullmatch(message) for pattern in patterns)]
    assert not missing, "docs/troubleshooting.md quotes messages that no source file contains"


def test_documentation_builds_in_strict_mode(tmp_path: Path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for page in tmp_path.rglob("*.html"):
        loaded = re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(https?://[^"]+)"', page.read_text())
        assert not loaded, f"{page.name} loads {loaded} from the network"
