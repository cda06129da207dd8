"""The errors of the train command for invalid command lines."""

from fira.commands.train import main
from fira.errors import UserError


def messages(flags: list[list[str]]) -> list[str]:
    """The message of the UserError of each command line, all in one process; empty where there is no error."""
    found = []
    for arguments in flags:
        try:
            main(arguments, prog="train.py")
        except UserError as error:
            found.append(str(error))
        else:
            found.append("")
    return found
