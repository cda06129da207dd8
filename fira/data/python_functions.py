"""The public functions of the installed Python, with their parameters and the first sentence of their documentation.

Functions written in Python are read from the source of the standard library, and those written in C are read from the
interpreter. Nothing is installed, and no module of the library is imported but those in COMPILED.
"""

import ast
import binascii
import builtins
import cmath
import gc
import inspect
import itertools
import math
import os
import re
import sys
import sysconfig
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

# Platform modules, deprecated ones, and programs: their functions are not called by users.
SKIPPED = {
    *("distutils", "encodings", "ensurepip", "idlelib", "lib2to3", "msilib", "nturl2path", "ntpath", "pickletools"),
    *("pydoc", "pydoc_data", "sndhdr", "imghdr", "site", "sysconfig", "tkinter", "turtle", "turtledemo", "venv"),
}
# Modules in C by the name under which their functions are used.
COMPILED: dict[ModuleType, str] = {
    **{builtins: "", sys.modules[os.name]: "os"},
    **{module: module.__name__ for module in (binascii, cmath, gc, itertools, math, sys, time, zlib)},
}
TYPES = (bytes, dict, float, int, list, set, str)  # whose methods are included
ALIASES = {"posixpath": "os.path", "genericpath": "os.path"}
SUMMARY = re.compile(r"[A-Z][^\n`]{14,98}\.")  # one sentence
CALL = re.compile(r"\A(?:[\w.]+\([^\n]*|[^\n]*->[^\n]*)\n+")  # in C: "sin(x)", "time() -> float" before the text


class Function(NamedTuple):
    """A function or a method of a built-in type.

    name: as it is used, such as "os.path.join" or "str.split". module: empty for what needs no import. parameters: as
    in its definition, such as "a, *p"; None if they are not known. names: of the parameters.
    """

    name: str
    module: str
    parameters: str | None
    names: tuple[str, ...]
    summary: str


def public_functions(files: Sequence[Path]) -> list[Function]:
    """The functions in files of the standard library and in C, sorted by name.

    Of those with the same summary, the one with the shortest name is included.
    """
    found = [*written_in_c(), *(function for path in files for function in written_in_python(path))]
    by_name = {function.name: function for function in found}
    longest_first = sorted(by_name.values(), key=lambda function: (-len(function.name), function.name))
    return sorted({function.summary: function for function in longest_first}.values())


def module_name(path: Path) -> str:
    """The name by which a file of the standard library is imported."""
    return ".".join(path.relative_to(sysconfig.get_path("stdlib")).with_suffix("").parts).removesuffix(".__init__")


def written_in_python(path: Path) -> Iterator[Function]:
    """Yield the public functions that the module in a file defines and documents."""
    module = module_name(path)
    if module.partition(".")[0] in SKIPPED or any(part.startswith("_") for part in module.split(".")):
        return
    module = ALIASES.get(module, module)
    for node in ast.parse(path.read_text(encoding="utf-8", errors="replace")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and re.match(r"(?!_|main$)", node.name):
            a = node.args
            ordered = [*a.posonlyargs, *a.args, a.vararg, *a.kwonlyargs, a.kwarg]
            names = tuple(argument.arg for argument in ordered if argument)
            if sentence := summary(ast.get_docstring(node) or ""):
                yield Function(f"{module}.{node.name}", module, ast.unparse(a), names, sentence)


def written_in_c() -> Iterator[Function]:
    """Yield the functions of the modules in COMPILED and the methods of TYPES."""
    methods = {kind: kind.__name__ for kind in TYPES}
    for owner, prefix in (COMPILED | methods).items():
        for name, value in sorted(vars(owner).items()):
            if name.startswith("_") or not (inspect.isbuiltin(value) or inspect.ismethoddescriptor(value)):
                continue
            full = f"{prefix}.{name}" if prefix else name
            module = "" if isinstance(owner, type) else prefix
            if sentence := summary(CALL.sub("", inspect.getdoc(value) or "")):
                yield Function(full, module, *_signature(value), sentence)


def _signature(value: object) -> tuple[str | None, tuple[str, ...]]:
    """The parameters of a callable without `self`, and their names."""
    try:
        signature = inspect.signature(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None, ()
    kept = [parameter for name, parameter in signature.parameters.items() if name != "self"]
    shown = str(signature.replace(parameters=kept, return_annotation=inspect.Signature.empty))
    return shown[1:-1], tuple(parameter.name for parameter in kept)


def summary(docstring: str) -> str | None:
    """The first sentence of a docstring; None if it is not a sentence of a usual length."""
    first = " ".join(docstring.strip().partition("\n\n")[0].split()).partition(". ")[0].rstrip(".") + "."
    return first if SUMMARY.fullmatch(first) and not first.endswith(("e.g.", "i.e.")) else None
