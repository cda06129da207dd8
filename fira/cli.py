"""Shared parts of the commands: argument parsing, log messages, and one-line errors with exit status 2."""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, NoReturn

from fira.errors import UserError
from fira.value_types import FLAG_TYPES, FlagType
from fira.wait_policy import share_cores
from pipeline.mpi.failure import abort_on_failure, fail
from pipeline.mpi.launchers import launched_rank
from pipeline.mpi.world import MissingMPIError, init

SCRIPTS = {"prepare": "prepare_data"}  # commands whose script in scripts/ has another name


class _HelpFormatter(argparse.HelpFormatter):
    """Appends the range of a number to its help."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        kind = action.type if isinstance(action.type, FlagType) else FLAG_TYPES.get(action.type)
        ranges = kind.ranges() if kind else ""
        return f"{action.help}; {ranges}" if action.help and ranges else action.help


class Parser(argparse.ArgumentParser):
    """ArgumentParser that accepts `--min_lr` for `--min-lr` and raises UserError on invalid arguments.

    An argument's `type` may be one of FLAG_TYPES, whose values are checked.

    Args:
        description: text above the flags in the output of `--help`.
        prog: name in messages; default: the file name of the script.
    """

    def __init__(self, description: str | None, prog: str | None = None) -> None:
        super().__init__(prog, description=description, allow_abbrev=False, formatter_class=_HelpFormatter)
        for hint, flag_type in FLAG_TYPES.items():
            self.register("type", hint, flag_type)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        arguments = sys.argv[1:] if args is None else args
        return super().parse_known_args([_with_hyphens(argument) for argument in arguments], namespace)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}; see --help")

    def print_help(self, file: Any = None) -> None:
        if not launched_rank():
            super().print_help(file)

    def start(self, arguments: Sequence[str] | None) -> argparse.Namespace:
        """Add `--quiet` and `--verbose`, parse the arguments, and start logging in this process."""
        self.add_verbosity()
        options = self.parse_args(arguments)
        start_logging(options.quiet, options.verbose)
        return options

    def add_verbosity(self) -> None:
        """Add `--quiet` and `--verbose`."""
        group = self.add_mutually_exclusive_group()
        switch = argparse.BooleanOptionalAction
        group.add_argument("--quiet", action=switch, default=False, help="print only results, warnings and errors")
        group.add_argument("--verbose", action=switch, default=False, help="print all messages with rank and level")


def _with_hyphens(argument: str) -> str:
    """Replace underscores by hyphens in the name of a flag, not in its value."""
    name, separator, value = argument.partition("=")
    return name.replace("_", "-") + separator + value if argument.startswith("--") else argument


def start_logging(quiet: bool, verbose: bool, rank: int = 0) -> None:
    """Print the log messages of fira and pipeline: warnings and errors to stderr, information to stdout.

    By default information is printed by rank 0 alone and without a prefix. Warnings, and with `verbose` all messages
    of all ranks, are preceded by rank, level and name of the logger.
    """
    level = logging.DEBUG if verbose else logging.WARNING if quiet or rank > 0 else logging.INFO
    prefixed = logging.Formatter(f"rank {rank} %(levelname)s %(name)s: %(message)s")
    information = logging.StreamHandler(sys.stdout)
    information.addFilter(lambda record: record.levelno < logging.WARNING)
    if verbose:
        information.setFormatter(prefixed)
    warnings = logging.StreamHandler(sys.stderr)
    warnings.setLevel(logging.WARNING)
    warnings.setFormatter(prefixed)
    for name in ("fira", "pipeline"):
        logger = logging.getLogger(name)
        logger.handlers = [information, warnings]
        logger.setLevel(level)


def print_pieces(pieces: Iterable[str]) -> list[str]:
    """Print a text and a newline while it is generated, until its end or Ctrl-C. Return the printed pieces."""
    printed = []
    with suppress(KeyboardInterrupt):
        for piece in pieces:
            print(piece, end="", flush=True)
            printed.append(piece)
    print(flush=True)
    return printed


def command_words(command: str) -> list[str]:
    """The words that start another command in the same way as this one, by `fira` or by a script in scripts/."""
    if Path(sys.argv[0]).name == "fira":
        return ["fira", command]
    return ["python", f"scripts/{SCRIPTS.get(command, command)}.py"]


def run(main: Callable[[], None], parallel: bool = False) -> None:
    """Call main and handle its errors.

    A UserError ends all ranks with one line on stderr and exit status 2. A closed stdout ends the program quietly.
    parallel: whether the ranks of mpirun run the command together. Any other command runs on rank 0 only.
    """
    if sys.platform == "win32":
        fail("Fira's commands need Linux or macOS; on Windows, run them in WSL 2 (wsl --install)", 2)
    rank = launched_rank()
    if rank and not parallel:
        return
    with abort_on_failure() if parallel else nullcontext():
        _run(main, rank, parallel)


def _run(main: Callable[[], None], rank: int | None, parallel: bool) -> None:
    share_cores()
    try:
        main()
    except UserError as error:
        if rank is not None and parallel:
            init()  # so that the line is printed once, also if the error precedes the initialization
        fail(str(error), 2)
    except MissingMPIError as error:
        fail(str(error), 2)
    except BrokenPipeError:  # as in `… | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        fail("", 141)  # the status that a shell reports for a program that SIGPIPE ended
