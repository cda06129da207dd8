"""The order of the folders: every import points downwards, and no files import each other in a cycle."""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.launch import ROOT

# From top to bottom. A folder imports only from folders below it, and from itself.
ORDER = [
    "scripts",
    "fira.commands",
    "fira.doctor",
    "fira.training",
    "fira.planner",
    "fira.generation",
    "fira.huggingface",
    "fira.metrics",
    "fira.checkpoint",
    "fira.parallel",
    "fira.optim",
    "fira.data",
    "fira.models",
    "fira.decoding",
    "fira.nn.moe",
    "fira.nn",
    "fira.nn.kernels",
    "fira",  # errors.py, files.py, …: modules that belong to no subject
    "pipeline",
    "pipeline.mpi",
]
PUBLIC = ("fira", "pipeline")  # __init__.py: the public names, above everything and imported by nothing inside
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in ("pipeline", "fira", "scripts")
    for path in sorted((ROOT / folder).rglob("*.py"))
}
NOT_DISTRIBUTED = ("fira.data", "fira.models", "fira.decoding", "fira.nn")
MODULE = re.compile(r"(?:fira|pipeline|scripts)(?:\.\w+)+")


def folder_of(module: str) -> str:
    """The entry of ORDER that a module belongs to."""
    return next(folder for folder in sorted(ORDER, key=len, reverse=True) if f"{module}.".startswith(f"{folder}."))


def imports(module: str) -> set[str]:
    """The full names of everything that a module imports, anywhere in it: as statements or as strings."""
    found = set()
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and MODULE.fullmatch(node.value):
            found.add(node.value)
    return found


def modules_imported(module: str) -> set[str]:
    """The files of the project that a module imports."""
    found = set()
    for name in imports(module):
        while name and name not in FILES:
            name = name.rpartition(".")[0]
        if name:
            found.add(name)
    return found - {module}


GRAPH = {module: modules_imported(module) for module in FILES}


@pytest.mark.parametrize("module", sorted(set(FILES) - set(PUBLIC)))
def test_imports_point_downwards(module):
    level = ORDER.index(folder_of(module))
    assert not [name for name in GRAPH[module] if ORDER.index(folder_of(name)) < level]
    assert not GRAPH[module] & set(PUBLIC) or module.startswith(("scripts.", "fira.commands"))


def test_there_is_no_cycle():
    inside = {module: GRAPH[module] - set(PUBLIC) for module in FILES if module not in PUBLIC}
    try:
        list(TopologicalSorter(inside).static_order())
    except CycleError as error:
        pytest.fail(f"these files import each other: {' → '.join(error.args[1])}")


def test_no_two_files_have_the_same_name():
    """Only the scripts have names of other files: those of the modules in fira/commands that they call."""
    names = [path.name for module, path in FILES.items() if not module.startswith("scripts.")]
    names = [name for name in names if name != "__init__.py"]
    assert sorted(names) == sorted(set(names))


def test_test_files_mirror_the_source_tree():
    tests = [path for folder in PUBLIC for path in (ROOT / "tests" / folder).rglob("test_*.py")]
    names = {path.relative_to(ROOT / "tests").as_posix() for path in tests}
    assert not [name for name in names if not (ROOT / name.replace("/test_", "/")).is_file()]


def uses(module: str, *packages: str) -> list[str]:
    return [name for name in imports(module) if f"{name}.".startswith(tuple(f"{package}." for package in packages))]


@pytest.mark.parametrize("module", sorted(FILES))
def test_packages_with_a_place_of_their_own(module):
    """mpi4py, torchgpipe and torch.distributed are imported where they belong, and pickle nowhere."""
    assert not uses(module, "pickle")
    assert module.startswith("pipeline.mpi") or not uses(module, "mpi4py")
    assert module == "pipeline.torchgpipe_stage" or not uses(module, "torchgpipe")
    if module.startswith(NOT_DISTRIBUTED):
        assert not uses(module, "torch.distributed", "pipeline")
    if module.startswith("pipeline.mpi"):
        assert not [name for name in GRAPH[module] if not name.startswith("pipeline.mpi")]


def test_schedules_know_neither_torch_nor_ranks():
    for name in ("schedule", "simulate", "timeline", "partition"):
        assert not uses(f"pipeline.{name}", "torch", "numpy", "mpi4py")


def test_the_order_names_every_folder():
    assert set(map(folder_of, FILES)) | {"fira.commands"} == set(ORDER)
    assert all((ROOT / folder.replace(".", "/")).is_dir() for folder in ORDER if folder != "fira.commands")


def test_an_upward_import_in_any_form_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The test above can fail: a statement inside a function, one for type checkers only, and a string are all seen."""
    source = "if TYPE_CHECKING:\n    from fira.training.loop import train\ndef f():\n    import fira.planner.search\n"
    path = tmp_path / "x.py"
    path.write_text(source + "name = 'fira.checkpoint.shards'\n")
    monkeypatch.setitem(FILES, "fira.nn.x", path)
    assert modules_imported("fira.nn.x") == {"fira.training.loop", "fira.planner.search", "fira.checkpoint.shards"}
