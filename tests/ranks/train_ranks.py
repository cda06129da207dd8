"""What scripts/train.py raises for command lines that it cannot use."""

import runpy
import sys

from fira.errors import UserError
from tests.launch import ROOT

SCRIPT = ROOT / "scripts" / "train.py"


def messages(flags: list[list[str]]) -> list[str]:
    """The message of the UserError of each command line, all in one process."""
    main = runpy.run_path(str(SCRIPT))["main"]
    found = []
    for arguments in flags:
        sys.argv = [str(SCRIPT), *arguments]
        try:
            main()
        except UserError as error:
            found.append(str(error))
        else:
            found.append("")
    return found
