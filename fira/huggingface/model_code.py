"""The source code of the models as one flat folder, the form in which transformers loads remote code.

    fira/huggingface/modeling_fira.py   →   modeling_fira.py
    fira/nn/moe/layer.py                →   layer.py
    from fira.nn.moe.layer import MoE   →   from .layer import MoE

The rewriting does not change the files of a flat folder, so a model loaded from one can be saved with its code.
"""

import ast
import sys
from importlib.util import find_spec
from pathlib import Path

ENTRY_POINTS = ("configuration_fira", "modeling_fira")  # the modules that `auto_map` in config.json names


def flat_sources(package: str) -> dict[str, str]:
    """Sources of the entry points in `package` and of all modules of the project that they import, by file name.

    transformers copies the files behind the config class and those behind the model class into two packages. In the
    first of them `modeling_fira` is missing and is skipped here; transformers saves the files of the second itself.

    Raises ValueError if two of the modules have the same base name.
    """
    sources: dict[str, str] = {}
    modules: dict[str, str] = {}  # by base name
    pending = [module for name in ENTRY_POINTS if (module := f"{package}.{name}") in sys.modules]
    while pending:
        module = pending.pop()
        base = module.rpartition(".")[2]
        if modules.setdefault(base, module) != module:
            raise ValueError(f"{modules[base]} and {module} have the same base name; an exported folder is flat")
        if f"{base}.py" not in sources:
            sources[f"{base}.py"], imported = _flatten(module)
            pending += imported
    return sources


def write_model_code(folder: str | Path, package: str) -> None:
    """Write `flat_sources(package)` into `folder`, which is created if it does not exist."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, source in flat_sources(package).items():
        Path(folder, name).write_text(source, encoding="utf-8")


def _flatten(module: str) -> tuple[str, list[str]]:
    """Source of a module with the project's imports made relative to one folder, and the modules they refer to."""
    spec = find_spec(module)  # not in sys.modules: fused kernels are imported on a GPU only
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).read_text(encoding="utf-8")
    lines = source.splitlines(keepends=True)
    root, imported = module.partition(".")[0], []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ImportFrom) or node.module is None:
            continue
        if node.level:  # the module is in a flat folder already
            imported.append(f"{module.rpartition('.')[0]}.{node.module}")
        elif node.module.partition(".")[0] == root:
            imported.append(node.module)
            absolute, relative = f"from {node.module} import", f"from .{node.module.rpartition('.')[2]} import"
            lines[node.lineno - 1] = lines[node.lineno - 1].replace(absolute, relative)
    return "".join(lines), imported
