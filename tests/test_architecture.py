"""Arrows point downwards: scripts → fira → pipeline → torch.distributed."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [path for folder in ("pipeline", "fira", "scripts") for path in sorted((ROOT / folder).rglob("*.py"))]
# The named places of fira that know ranks; models and data know nothing distributed.
MAY_IMPORT_PIPELINE = {
    "fira/__init__.py",
    "fira/expert_parallel.py",
    "fira/layout.py",
    "fira/local_pipeline.py",
    "fira/parallelize.py",
    "fira/planning/choose.py",
    "fira/planning/layers.py",
    "fira/planning/measure.py",
    "fira/planning/picture.py",
    "fira/planning/predict.py",
    "fira/planning/ways.py",
    "fira/training/batch.py",
    "fira/training/config.py",
    "fira/training/loop.py",
    "fira/training/optimizer.py",
    "fira/training/setup.py",
    "fira/training/tracing.py",
    "fira/training/trainer.py",
}


def imports(path: Path) -> set[str]:
    """The full names of all that a file imports, wherever in it.

    The models' files import one another by relative names, because an exported model takes them along.
    """
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(ROOT).parts[:-1]
            assert node.level <= (package == ("fira", "models")), f"{path}: imports are absolute here"
            module = ".".join([*package[: len(package) * node.level], *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def uses(path: Path, *packages: str) -> list[str]:
    return [name for name in imports(path) if any(name == p or name.startswith(p + ".") for p in packages)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports(path):
    place = path.relative_to(ROOT)
    name = str(place)
    if place.parts[0] == "pipeline":
        assert not uses(path, "fira", "scripts")
    if place.parts[0] == "fira":
        assert not uses(path, "scripts")
    if place.parts[:2] != ("pipeline", "mpi"):
        assert not uses(path, "mpi4py")
    if name != "pipeline/local.py":
        assert not uses(path, "torchgpipe")
    if place.parts[0] == "fira" and name not in MAY_IMPORT_PIPELINE:
        assert not uses(path, "pipeline")
    if place.parts[:2] in (("fira", "models"), ("fira", "data")):
        assert not uses(path, "torch.distributed", "fira.training", "fira.parallelize")
    assert not uses(path, "pickle")


def test_schedules_know_neither_torch_nor_ranks():
    for name in ("schedule", "simulate", "trace", "partition"):
        assert not uses(ROOT / "pipeline" / f"{name}.py", "torch", "numpy", "mpi4py")
