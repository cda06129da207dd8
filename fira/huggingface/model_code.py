"""The source code of the models as one flat folder, which is what transformers loads as remote code.

    fira/huggingface/modeling_fira.py   →   modeling_fira.py
    fira/nn/moe/layer.py                →   layer.py
    from fira.nn.moe.layer import MoE   →   from .layer import MoE

A flat folder is a fixed point of this rewriting, so a model loaded from one can be saved with its code as well.
"""

import ast
import sys
from pathlib import Path

ENTRY_POINTS = ("configuration_fira", "modeling_fira")  # the modules that `auto_map` in config.json names


def flat_sources(package: str) -> dict[str, str]:
    """The sources of the entry points in `package` and of all modules of ours that they import, by file name.

    Raises ValueError where two of the modules have the same base name.
    """
    sources: dict[str, str] = {}
    found: dict[str, str] = {}  # base name → module
    waiting = [f"{package}.{name}" for name in ENTRY_POINTS]
    while waiting:
        module = waiting.pop()
        base = module.rpartition(".")[2]
        if found.setdefault(base, module) != module:
            raise ValueError(f"{found[base]} and {module} have the same base name; an exported folder is flat")
        if f"{base}.py" not in sources:
            sources[f"{base}.py"], imported = _flatten(module)
            waiting += imported
    return sources


def write_model_code(folder: str | Path, package: str) -> None:
    """Write `flat_sources(package)` into `folder`, which is created where it is missing."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, source in flat_sources(package).items():
        Path(folder, name).write_text(source, encoding="utf-8")


def _flatten(module: str) -> tuple[str, list[str]]:
    """A module's source with imports of ours made relative to one folder, and the modules that it imports."""
    source = Path(str(sys.modules[module].__file__)).read_text(encoding="utf-8")
    lines = source.splitlines(keepends=True)
    root, imported = module.partition(".")[0], []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ImportFrom) or node.module is None:
            continue
        if node.level:  # a flat folder
            imported.append(f"{module.rpartition('.')[0]}.{node.module}")
        elif node.module.partition(".")[0] == root:
            imported.append(node.module)
            written, flat = f"from {node.module} import", f"from .{node.module.rpartition('.')[2]} import"
            lines[node.lineno - 1] = lines[node.lineno - 1].replace(written, flat)
    return "".join(lines), imported
