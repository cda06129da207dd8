"""What the scripts share: flags where hyphens and underscores are the same, and one line for the user's mistakes."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from fira.errors import UserError
from pipeline.mpi.failure import abort_on_failure


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that shows defaults, takes `--min_lr` for `--min-lr`, and raises UserError on bad flags.

    speaks: asked whether --help prints; of several ranks one does.
    """

    def __init__(self, description: str | None, speaks: Callable[[], bool] = lambda: True) -> None:
        super().__init__(description=description, allow_abbrev=False)
        self.speaks = speaks

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        given = sys.argv[1:] if args is None else args
        return super().parse_args([_hyphens(argument) for argument in given], namespace)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}; see --help")

    def print_help(self, file: Any = None) -> None:
        if self.speaks():
            super().print_help(file)


def _hyphens(argument: str) -> str:
    name, separator, value = argument.partition("=")
    return name.replace("_", "-") + separator + value if argument.startswith("--") else argument


def _exit(message: str, status: int) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(status)


@abort_on_failure()
def run(main: Callable[[], None], fail: Callable[[str, int], NoReturn] = _exit) -> None:
    """Call main; a UserError becomes its one line on stderr and exit status 2. Who stops reading is not told so.

    fail(message, status) ends the program; a program of several ranks passes one that ends all.
    """
    try:
        main()
    except UserError as error:
        fail(str(error), 2)
    except BrokenPipeError:  # as in `… | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)  # what the shell says of a program that SIGPIPE ended
