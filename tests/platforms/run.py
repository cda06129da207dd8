"""Run the fast tests with other versions of Python, torch and all packages, one row of rows.toml after the other.

    python -m tests.platforms.run [--only ROW …] [--work FOLDER]

For each row, a copy of this checkout is installed with its extras by pip into a new virtual environment, and the
documented test command runs there. Tests that fail are repeated once in one process, because those that start ranks
have time limits, which a busy machine can exceed. The results are merged into results.csv and into the table of
docs/platforms.md. A row whose Python is not on PATH is reported as not run.
"""

import argparse
import csv
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from dataclasses import asdict, dataclass, fields
from itertools import chain
from pathlib import Path
from xml.etree import ElementTree

from packaging.requirements import Requirement

from fira.progress_bar import progress_bar

ROOT = Path(__file__).parents[2]
ROWS = tomllib.loads(Path(__file__).with_name("rows.toml").read_text(encoding="utf-8"))
RESULTS = Path(__file__).with_name("results.csv")
PAGE = ROOT / "docs" / "platforms.md"
EXTRAS = ("mpich", "gguf", "serve", "tiktoken", "tensorboard", "trackio", "hf", "docs", "dev")
IGNORED = shutil.ignore_patterns(".git", "runs", ".*_cache", "__pycache__", ".venv", "*.egg-info")
FOREIGN = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "LD_LIBRARY_PATH")  # variables of this environment
VERSIONS = """
import platform
from importlib.metadata import version
print(platform.python_version(), *map(version, ["torch", "numpy", "transformers"]))
"""


@dataclass(frozen=True)
class Result:
    """One row of the table. repeated: tests that passed when they were repeated; failed: those that failed again."""

    row: str
    python: str
    torch: str = ""
    numpy: str = ""
    transformers: str = ""
    passed: int | str = ""  # empty: the row was not run
    repeated: int | str = ""
    failed: int | str = ""
    skipped: int | str = ""
    minutes: float | str = ""
    note: str = ""


class NotRun(Exception):
    """The reason why a row has no test result."""


def lower_bounds(pyproject: Path) -> list[str]:
    """Return the constraint `name==bound` for every range `name>=bound` of the dependencies and of the extras."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    lists = [project["dependencies"], *(project["optional-dependencies"][extra] for extra in EXTRAS)]
    bounds = {}
    for requirement in map(Requirement, chain(*lists)):
        (bound,) = (part for part in requirement.specifier if part.operator == ">=")
        bounds[requirement.name] = f"{requirement.name}=={bound.version}"
    return list(bounds.values())


def interpreter(version: str) -> str:
    """Return the path of the Python of a version, such as "3.12", on PATH."""
    path = shutil.which(f"python{version}")
    if path is None or subprocess.run([path, "-c", ""], capture_output=True, check=False).returncode:
        raise NotRun(f"python{version} is not on PATH")  # or it is a shim of pyenv for a version that is not active
    return path


def run(command: list[object], folder: Path, label: str) -> None:
    """Run a command that must succeed, and print how long it took."""
    print(f"{label} …", flush=True)
    started = time.monotonic()
    done = subprocess.run([*map(str, command)], cwd=folder, env=environment(), capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no output"]
        *_, last = [line for line in lines if line.startswith("ERROR")] or lines  # of pip, which repeats its warnings
        raise NotRun(f"{label} failed: {last}")
    print(f"{label}: {time.monotonic() - started:.0f} s", flush=True)


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in FOREIGN}


def install(name: str, tree: Path, python: str) -> Path:
    """Install a copy of the checkout in `tree` into a new environment. Return its interpreter."""
    shutil.copytree(ROOT, tree, ignore=IGNORED)
    row = ROWS[name]
    pins = [*(lower_bounds(tree / "pyproject.toml") if row.get("lowest") else []), *row.get("pins", [])]
    (tree / "pins.txt").write_text("".join(f"{pin}\n" for pin in pins), encoding="utf-8")
    packages = ["-r", "requirements.txt"] if row.get("pinned") else ["-c", "pins.txt", "-e", f".[{','.join(EXTRAS)}]"]
    run([python, "-m", "venv", ".venv"], tree, f"{name}: creating the environment")
    program = tree / ".venv" / "bin" / "python"
    run([program, "-m", "pip", "install", "-q", *packages], tree, f"{name}: installing packages")
    return program


def run_tests(program: Path, tree: Path, label: str, flags: list[str]) -> dict[str, str]:
    """Run pytest. Return the outcome of each test: passed, failed or skipped."""
    report = tree / "report.xml"
    report.unlink(missing_ok=True)
    command = [program, "-m", "pytest", "--color=no", f"--junitxml={report}", *flags]
    log = (tree / "pytest.log").open("a", buffering=1, encoding="utf-8")
    with (
        log,
        progress_bar(100, label, shown=True, unit="%") as bar,
        subprocess.Popen(
            [*map(str, command)],
            cwd=tree,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as tests,
    ):
        for line in tests.stdout:
            log.write(line)
            if share := re.search(r"\[ *(\d+)%\]$", line.rstrip()):
                bar.update(int(share[1]) - bar.n)
    if not report.exists():
        raise NotRun(f"pytest ended with status {tests.returncode}; see {log.name}")
    outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):
        found = {element.tag for element in case}
        outcome = "failed" if found & {"failure", "error"} else "skipped" if "skipped" in found else "passed"
        test = f"{case.get('classname')}::{case.get('name')}"
        if outcomes.get(test) != "failed":  # a test that passes and whose fixture then fails is listed twice
            outcomes[test] = outcome
    return outcomes


def test_row(name: str, work: Path) -> Result:
    """Install and test one row in a folder, which is removed if all tests pass."""
    tree = work / name
    shutil.rmtree(tree, ignore_errors=True)
    try:
        program = install(name, tree, interpreter(ROWS[name]["python"]))
        versions = subprocess.run(
            [program, "-c", VERSIONS], cwd=tree, env=environment(), capture_output=True, text=True
        )
        started = time.monotonic()
        outcomes = run_tests(program, tree, f"{name}: tests", [])
        first = {test for test, outcome in outcomes.items() if outcome == "failed"}
        if first:
            outcomes |= run_tests(program, tree, f"{name}: repeating {len(first)}", ["--last-failed", "-n", "0"])
    except NotRun as error:
        return Result(name, ROWS[name]["python"], note=f"not run: {error}")
    failed = sorted(test for test, outcome in outcomes.items() if outcome == "failed")
    for test in sorted(first - {*failed}):
        print(f"passed when it was repeated: {test}")
    counts = [list(outcomes.values()).count(outcome) for outcome in ("passed", "skipped")]
    if failed:
        print(*failed, f"output: {tree / 'pytest.log'}, environment: {program.parent}", sep="\n")
    else:
        shutil.rmtree(tree)
    return Result(
        *(name, *versions.stdout.split()),
        passed=counts[0],
        repeated=len(first) - len(failed),
        failed=len(failed),
        skipped=counts[1],
        minutes=round((time.monotonic() - started) / 60, 1),
        note="; ".join(test.rpartition("::")[2] for test in failed[:5]),
    )


def read_results() -> list[Result]:
    """Return the rows of results.csv."""
    with RESULTS.open(newline="", encoding="utf-8") as file:
        return [Result(**line) for line in csv.DictReader(file)]


def merge(results: list[Result]) -> None:
    """Write results to results.csv and to the table of the page, in the order of rows.toml.

    A result replaces the earlier one of its row, unless only the earlier one was measured.
    """
    stored = {result.row: result for result in read_results()}
    stored |= {result.row: result for result in results if result.passed != "" or result.row not in stored}
    with RESULTS.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Result)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(stored[name]) for name in ROWS if name in stored)
    before, _, page = PAGE.read_text("utf-8").partition("| row | python |")
    _, end, after = page.partition("\n\n")
    PAGE.write_text(before + table(read_results()) + end + after, "utf-8")


def table(results: list[Result]) -> str:
    """Return the results as a table in Markdown."""
    names = [field.name for field in fields(Result)]
    lines = [names, ["---"] * len(names), *([str(value) for value in asdict(result).values()] for result in results)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), help="rows to run; default: all")
    folder = Path(tempfile.gettempdir(), "fira-platforms")
    parser.add_argument(
        "--work", type=Path, default=folder, help=f"for the environments, up to 8 GB each; default: {folder}"
    )
    options = parser.parse_args()
    results = []
    for name in options.only:
        results.append(test_row(name, options.work.resolve()))
        merge(results)
        print(f"{name}: {results[-1].note or 'passed'}", flush=True)
    print(f"\n{table(read_results())}\n\nnext: read {PAGE.relative_to(ROOT)}, whose table has these results")
    return int(any(result.failed != 0 for result in results))


if __name__ == "__main__":
    sys.exit(main())
