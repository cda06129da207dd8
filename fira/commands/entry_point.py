"""The command `fira`, which runs one of the modules of this folder."""

import ast
import sys
from argparse import Namespace
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

from fira import cli
from fira.errors import UserError

COMMANDS = (
    *("train", "generate", "chat", "serve", "evaluate", "prepare", "questions", "plan", "plot", "doctor", "export"),
    *("recipe", "slurm", "watch"),
)
PARALLEL = ("train", "plan", "doctor", "recipe")  # the commands that all ranks run together


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    cli.run(lambda: run_command(name, sys.argv[2:]), parallel=name in PARALLEL)


def run_command(name: str, arguments: list[str]) -> None:
    """Run a command, or print the help or the version."""
    if name in COMMANDS:
        import_module(f"fira.commands.{name}").main(arguments, prog=f"fira {name}")
    elif name in ("-h", "--help"):
        print("usage: fira COMMAND [--help] …\n")
        print("\n".join(f"  {command:9} {first_line(command)}" for command in COMMANDS))
    elif name == "--version":
        print(f"fira {version('fira')}")
    else:
        found = f"unknown command {name}" if name else "no command given"
        raise UserError(f"fira: {found}; choose from {', '.join(COMMANDS)}, or see fira --help")


def parse_arguments(name: str, arguments: Sequence[str]) -> Namespace:
    """Parse the arguments of a command that has a function `add_arguments`, without running it.

    Raises UserError if its function `check`, where there is one, finds that they do not fit together.
    """
    module = import_module(f"fira.commands.{name}")
    parser = cli.Parser(module.__doc__, f"fira {name}")
    module.add_arguments(parser)
    parser.add_verbosity()
    options = parser.parse_args(arguments)
    if hasattr(module, "check"):
        module.check(options)
    return options


def first_line(command: str) -> str:
    """The first line of the docstring of a command's module, which is read without importing the module."""
    source = Path(__file__).with_name(f"{command}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]
