"""Mutation testing: `python -m tests.mutation.run [target …] [--sample N] [--seed S]`.

Each mutant of a target module (targets.toml) is written into a copy of the tree, where the target's tests run. A test
that fails or exceeds the time limit catches the mutant; the latter are printed. Survivors that equivalent.toml lists
with a reason do not count. Cosmic Ray's operators make the mutants; its runner is not used because it mutates the
working tree and identifies a mutant by its position in the file.
"""

import argparse
import gc
import importlib
import importlib.util
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import NoReturn

import tests.conftest  # noqa: F401  # before torch and Triton are imported, because it sets their environment

# isort: split
# Imported for the forks that run pytest: these packages take longer to import than most tests take to run.
import hypothesis.strategies  # noqa: F401
import pytest
import safetensors.torch  # noqa: F401
import tokenizers  # noqa: F401
import torch.fx.experimental.symbolic_shapes
import torch.utils.checkpoint
import torch.utils.flop_counter  # noqa: F401
import transformers.generation.logits_process  # noqa: F401

from tests.launch import members
from tests.mutation import forked_ranks
from tests.mutation.mutants import Mutant, mutants

ROOT = Path(__file__).parents[2]
TARGETS = tomllib.loads(Path(__file__).with_name("targets.toml").read_text(encoding="utf-8"))
EQUIVALENT = tomllib.loads(Path(__file__).with_name("equivalent.toml").read_text(encoding="utf-8"))


def is_equivalent(target: str, mutant: Mutant) -> bool:
    key = (mutant.definition, mutant.before, mutant.after)
    entries = EQUIVALENT.get(target, [])
    return any((e["definition"], e["before"], e.get("after", mutant.after)) == key for e in entries)


def outcome(tree: Path, tests: list[str], timeout: float) -> str:
    """Return "passed", "failed" or "timed out": the first result of a test file that is not "passed", if any."""
    return next((result for test in tests if (result := _file_outcome(tree, test, timeout)) != "passed"), "passed")


def _file_outcome(tree: Path, test: str, timeout: float) -> str:
    """Run one file or folder of tests in a fork, which has torch imported already, and end all of its processes."""
    gc.freeze()  # pytest calls gc.collect, which would visit all that is imported
    pid = os.fork()
    if pid == 0:
        _run_pytest(tree, test)
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return "failed" if status else "passed"
        time.sleep(0.02)
    os.kill(pid, signal.SIGINT)  # a test that waits for ranks ends them: they are in a session of their own
    time.sleep(10)
    for process in members(pid):
        os.kill(process, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "timed out"


def _run_pytest(tree: Path, test: str) -> NoReturn:
    """Run pytest in a tree, quietly, in a session of its own, and end this process with its status."""
    os.setsid()
    os.chdir(tree)
    os.environ["PYTHONPATH"] = str(tree)
    for name in [name for name in sys.modules if name.split(".")[0] == "tests"]:
        del sys.modules[name]  # they belong to the working tree
    sys.path[:] = [str(tree), *(path for path in sys.path if Path(path).resolve() != ROOT)]
    launch = importlib.import_module("tests.launch")  # that of the copy; the tests import it later
    launch.run_function = forked_ranks.run_function  # type: ignore[attr-defined]
    silent = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(silent, stream)
    os._exit(pytest.main(["-x", "-p", "no:cacheprovider", "--tb=no", "--timeout=0", test]))


def test_files(tree: Path, patterns: list[str]) -> list[str]:
    """The files that match, in the order of the patterns: with the fast tests first, most mutants are caught soon."""
    files = [str(path.relative_to(tree)) for pattern in patterns for path in sorted(tree.glob(pattern))]
    return list(dict.fromkeys(files))


def run_target(tree: Path, target: str, sample: int | None, seed: int) -> tuple[int, int, int, int]:
    """Print the survivors and return the numbers of mutants, caught, survived and listed as equivalent."""
    candidates = mutants(ROOT / target)
    equivalent = [mutant for mutant in candidates if is_equivalent(target, mutant)]
    tested = [mutant for mutant in candidates if mutant not in equivalent]
    if sample is not None and sample < len(tested):
        tested = sorted(random.Random(seed).sample(tested, sample), key=lambda mutant: mutant.line)
    tests, timeout = test_files(tree, TARGETS[target]["tests"]), TARGETS[target]["timeout"]
    if outcome(tree, tests, timeout) != "passed":
        raise SystemExit(f"{target}: its tests fail or take longer than {timeout} s without a mutation")
    module, survived = tree / target, 0
    bytecode = Path(importlib.util.cache_from_source(str(module)))
    original = module.read_text(encoding="utf-8")
    for mutant in tested:
        module.write_text(mutant.code, encoding="utf-8")
        bytecode.unlink(missing_ok=True)  # valid for every mutant of equal size that is written in the same second
        result = outcome(tree, tests, timeout)
        survived += result == "passed"
        if result != "failed":  # whether a mutant that exceeds the time limit is caught is for the reader to judge
            print(f"{result}: {target}:{mutant.line} in {mutant.definition or 'the module'} ({mutant.operator})")
            print(f"    - {mutant.before}\n    + {mutant.after}", flush=True)
    module.write_text(original, encoding="utf-8")
    bytecode.unlink(missing_ok=True)
    return len(tested) + len(equivalent), len(tested) - survived, survived, len(equivalent)


def row(target: str, count: int, caught: int, survived: int, equivalent: int) -> str:
    share = 100 * caught / max(1, caught + survived)
    return f"{target:34}{count:9}{caught:9}{survived:9}{equivalent:11}{share:10.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Mutate modules in a copy of the tree and run their tests.")
    parser.add_argument(
        "targets", nargs="*", metavar="target", help="module, such as pipeline/schedule.py; default: all"
    )
    parser.add_argument("--sample", type=int, help="test at most this many mutants of each target, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample")
    options = parser.parse_args()
    if unknown := set(options.targets) - set(TARGETS):
        parser.error(f"{', '.join(sorted(unknown))}: no such target in targets.toml")
    table = []
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "tree")
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".git", "runs", ".*_cache", "__pycache__", ".venv"))
        for target in options.targets or TARGETS:
            table.append(row(target, *run_target(tree, target, options.sample, options.seed)))
            print(table[-1], flush=True)
    print(
        f"{'target':34}{'mutants':>9}{'caught':>9}{'survived':>9}{'equivalent':>11}{'caught %':>10}", *table, sep="\n"
    )


if __name__ == "__main__":
    main()
