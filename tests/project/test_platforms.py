"""Systems other than Linux, imitated on Linux by removing what Python lacks there, and the table of versions."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.version import Version

from tests.launch import ROOT, inherited, run_ranks
from tests.platforms import run
from tests.platforms.hidden_names import LINUX_ONLY, UNIX_ONLY
from tests.platforms.run import Result, read_results, table
from tests.project.test_package import MODEL
from tests.torch_versions import MARKS

IMPORT_ALL = """
import sys
from importlib import import_module
from pathlib import Path
from tests.platforms.hidden_names import UNIX_MODULES, hide_unix

def project():
    return {name for name in sys.modules if name.partition(".")[0] in ("fira", "pipeline")}

files = [*Path("fira").rglob("*.py"), *Path("pipeline").rglob("*.py")]
names = sorted(".".join(file.with_suffix("").parts).removesuffix(".__init__") for file in files)
needs_package = []
for name in names:  # also imports all other packages, which have code of their own for Windows
    try:
        import_module(name)
    except ModuleNotFoundError as error:
        assert error.name.partition(".")[0] not in ("fira", "pipeline"), name
        needs_package.append(name)
for name in project():
    del sys.modules[name]
hide_unix()
for name in set(names) - set(needs_package):
    try:
        import_module(name)
    except (ImportError, AttributeError, TypeError) as error:
        print(f"{name}: {error!r}")
assert len(project()) > 200
"""


@pytest.mark.slow
def test_no_module_needs_posix_when_it_is_imported():
    command = [sys.executable, "-c", IMPORT_ALL]
    done = subprocess.run(command, cwd=ROOT, env=inherited(), capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_documentation_shows_the_results():
    assert table(read_results()) in (ROOT / "docs" / "platforms.md").read_text()


def test_nothing_is_skipped_with_a_new_torch():
    if Version(torch.__version__) >= Version("2.13"):
        assert [mark.kwargs["reason"] for mark in MARKS if mark.args[0]] == []


def test_measured_row_is_replaced_by_a_measurement_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(run, "RESULTS", tmp_path / "results.csv")
    monkeypatch.setattr(run, "PAGE", tmp_path / "page.md")
    Path(tmp_path, "results.csv").write_text("row\n")
    Path(tmp_path, "page.md").write_text("before\n\n| row | python |\n| --- | --- |\n\nafter\n")
    measured = Result("newest", "3.13.0", passed=7, failed=0)
    for result in (Result("newest", "3.13", note="not run"), measured, Result("newest", "3.13", note="not run again")):
        run.merge([result])
    assert (tmp_path / "page.md").read_text() == f"before\n\n{table([measured])}\n\nafter\n"
    assert [result.passed for result in read_results()] == ["7"]


def test_hidden_names_exist_on_linux():
    """A name that is misspelt would hide nothing."""
    assert [name for name in (*LINUX_ONLY, *UNIX_ONLY) if not hasattr(os, name)] == []


@pytest.mark.slow
def test_two_ranks_train_without_the_functions_of_linux(tmp_path: Path):
    """As on macOS: no affinity of processes, and no descriptors of processes. MPI and torch are those of Linux."""
    (tmp_path / "sitecustomize.py").write_text("from tests.platforms.hidden_names import hide_linux\nhide_linux()\n")
    text = tmp_path / "text.txt"
    text.write_text((ROOT / "README.md").read_text())
    flags = ["--data", text, "--steps", 2, "--batch-size", 4, "--eval-sequences", 4, "--out", tmp_path / "run", *MODEL]
    env = {"FIRA_CACHE": str(tmp_path / "cache"), "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    result = run_ranks(2, "scripts/train.py", *flags, timeout=120, env=env)
    assert result.returncode == 0, result.stderr
    assert "step 2/2" in result.stdout
    assert result.stderr == ""
