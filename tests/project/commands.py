"""Read the commands of Markdown files, and run them as a reader would, with as few steps as possible."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from tests.launch import ROOT

SETUP = "python -m venv .venv && . .venv/bin/activate && pip install -q -r requirements.txt && "


def blocks(text: str, language: str) -> list[str]:
    """The content of all fenced blocks of a language, without the indentation of the fence."""
    return re.findall(rf"^```{language}[^\n]*\n(.*?)^```", text, re.S | re.M)


def commands(text: str) -> list[str]:
    """One command per line of the `sh` blocks, without comments."""
    lines = (re.sub(r"\s+#.*", "", line).strip() for block in blocks(text, "sh") for line in block.splitlines())
    return [line for line in lines if line]


def table_commands(text: str) -> list[str]:
    """The commands in the last column of tables that start a script."""
    cells = [line.strip("| ").split(" | ")[-1] for line in text.splitlines() if line.startswith("| ")]
    return [command for cell in cells for command in re.findall(r"`((?:python|deepspeed) [^`]*scripts/[^`]+)`", cell)]


def make_checkout(folder: Path) -> Path:
    """Create a folder that looks like a checkout to the commands, with text to train on. All output stays in it."""
    for name in ("scripts", "recipes"):
        (folder / name).symlink_to(ROOT / name)
    text = (ROOT / "README.md").read_text()
    (folder / "README.md").write_text(text)
    (folder / "texts").mkdir()
    (folder / "texts" / "one.txt").write_text(text * 3)
    for name in ("domain", "general"):
        (folder / f"{name}.txt").write_text(text)
        (folder / f"{name}_test.txt").write_text(text[:2000])
    chats = [{"prompt": f"What is {n} + 1?", "completion": f"{n + 1}"} for n in range(40)]
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    pairs = [{"prompt": f"What is {n} + 1?", "chosen": f"{n + 1}", "rejected": "No idea"} for n in range(40)]
    (folder / "preferences.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    problems = [{"prompt": f"{n} + 1 = ?", "completion": f"{n}+1={n + 1} so {n + 1}"} for n in range(40)]
    (folder / "problems.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    (folder / "prompts.txt").write_text("def main\nimport \n")
    question = {"query": "A module is imported with", "choices": ["import", "return"], "answer": 0}
    (folder / "questions.jsonl").write_text(json.dumps(question) + "\n")
    rows = [f'"{line}","{line}"\n' for line in text.replace('"', "'").splitlines() if line]
    (folder / "pages.csv").write_text("Text,text\n" + "".join(rows))
    for name in ("stories", "hindi", "english"):
        (folder / f"{name}.csv").write_text("Text,number\n" + "".join(rows))
    return folder


def shortened(command: str) -> str:
    """The command without its set-up part, with few steps and tokens."""
    command = command.removeprefix(SETUP)
    if "train.py" in command:
        steps = 3 if "--resume" in command else 2
        command = re.sub(r" --steps \d+", "", command) + f" --steps {steps} --eval-sequences 4 --batch-size 4"
        command = re.sub(r"--vocab-size \d+", "--vocab-size 300", command)
    if "generate.py" in command and "--eval-text" not in command:
        command += " --max-new-tokens 5"
    return command


def run(command: str, place: Path, stdin: str = "") -> str:
    """Run a command in `place` with this Python first on the PATH; return its stdout.

    Raises AssertionError if it fails.
    """
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "FIRA_CACHE": str(place / "cache"),
        "HF_HUB_OFFLINE": "1",
    }
    result = subprocess.run(
        ["bash", "-c", command],
        cwd=place,
        env=environment,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def run_python(code: str, place: Path) -> str:
    """Run a Python block in `place`; return its stdout."""
    (place / "block.py").write_text(code)
    return run("python block.py", place)
