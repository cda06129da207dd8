"""The order of the folders: every import points downwards, and no files import each other in a cycle."""

import ast
import re
from collections.abc import Callable
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.launch import ROOT

# From top to bottom. A folder imports only from folders below it, and from itself.
ORDER = [
    "scripts",
    "fira.commands",
    "fira.recipes",
    "fira.supervisor",
    "fira.doctor",
    "fira.watching",
    "fira.training",
    "fira.evaluation",
    "fira.posttraining",
    "fira.planner",
    "fira.serving",
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
BY_NAME = {"import_module", "resolve_name", "run_module", "run_path", "__import__", "exec", "eval"}
IMPORTS_BY_NAME = {"fira", "fira.commands.entry_point", "fira.doctor.gpu_check", "fira.decoding.sampler"}


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
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= {match[0] for match in [MODULE.match(node.value)] if match}  # "fira.x:f" and f"fira.x.{f}", too
    return found


def functions_that_import(module: str) -> set[str]:
    """The functions of BY_NAME that a module uses; only `eval` has other meanings, as a method."""
    found = set()
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.alias):
            found.add(node.name)
        elif isinstance(node, ast.Attribute) and node.attr != "eval":
            found.add(node.attr)
    return found & BY_NAME


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


@pytest.mark.parametrize("module", sorted(FILES))
def test_every_module_and_package_has_a_docstring(module):
    assert ast.get_docstring(ast.parse(FILES[module].read_text()))


def test_test_files_mirror_the_source_tree():
    tests = [path for folder in PUBLIC for path in (ROOT / "tests" / folder).rglob("test_*.py")]
    names = {path.relative_to(ROOT / "tests").as_posix() for path in tests}
    assert not [name for name in names if not (ROOT / name.replace("/test_", "/")).is_file()]


def uses(module: str, *packages: str) -> list[str]:
    return [name for name in imports(module) if f"{name}.".startswith(tuple(f"{package}." for package in packages))]


@pytest.mark.parametrize("module", sorted(FILES))
def test_packages_with_a_place_of_their_own(module):
    """Imports of mpi4py, torchgpipe and torch.distributed are where they belong; no pickle, nothing uninstalled."""
    assert not uses(module, "pickle", "tests", "benchmarks")
    assert module.startswith("pipeline.mpi") or not uses(module, "mpi4py")
    assert module == "pipeline.torchgpipe_stage" or not uses(module, "torchgpipe")
    if module.startswith(NOT_DISTRIBUTED):
        assert not uses(module, "torch.distributed", "pipeline")
    if module.startswith("pipeline.mpi"):
        assert not [name for name in GRAPH[module] if not name.startswith("pipeline.mpi")]


@pytest.mark.parametrize("module", sorted(FILES))
def test_imports_by_name_are_rare(module):
    """A name can be assembled from strings, so import_module is used in four files only and its relatives nowhere."""
    assert functions_that_import(module) <= ({"import_module"} if module in IMPORTS_BY_NAME else set())


def test_schedules_know_neither_torch_nor_ranks():
    for name in ("schedule", "simulate", "timeline", "partition"):
        assert not uses(f"pipeline.{name}", "torch", "numpy", "mpi4py")


def test_the_order_names_every_folder():
    assert set(map(folder_of, FILES)) | {"fira.commands"} == set(ORDER)
    assert all((ROOT / folder.replace(".", "/")).is_dir() for folder in ORDER if folder != "fira.commands")


@pytest.fixture
def module_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Function that adds a module with the given source to fira/nn and returns its name."""

    def add(source: str) -> str:
        path = tmp_path / "x.py"
        path.write_text(source)
        monkeypatch.setitem(FILES, "fira.nn.x", path)
        return "fira.nn.x"

    return add


@pytest.mark.parametrize(
    "source",
    [
        "if TYPE_CHECKING:\n    from fira.training.loop import train",
        "def f():\n    import fira.training.loop as loop",
        "from fira.training import *",
        "name = 'fira.training.loop'",
        "name = 'fira.training.loop:train'",
        "name = f'fira.training.{name}'",
        "def f() -> 'fira.training.loop.X': ...",
    ],
)
def test_an_upward_import_in_any_form_is_found(module_with: Callable[[str], str], source: str):
    (name,) = modules_imported(module_with(source))
    assert name in ("fira.training", "fira.training.loop")


@pytest.mark.parametrize(
    "source",
    [
        "import importlib\nimportlib.import_module('.training.loop', 'fira')",
        "import importlib\nimportlib.import_module('fira').training",
        "from importlib import import_module as get\nget('fira' + '.training')",
        "from pkgutil import resolve_name",
        "f = __import__",
        "exec('from fira.training import loop')",
    ],
)
def test_an_import_by_name_in_any_form_is_found(module_with: Callable[[str], str], source: str):
    assert functions_that_import(module_with(source))


def test_a_relative_import_is_refused(module_with: Callable[[str], str]):
    with pytest.raises(AssertionError, match="absolute"):
        imports(module_with("from ..training import loop"))
