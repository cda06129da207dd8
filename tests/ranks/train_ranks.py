"""Errors of the train command for invalid command lines."""

from fira.commands.train import main
from fira.errors import UserError


def messages(flags: list[list[str]]) -> list[str]:
    """Return the message of each command line's UserError, or an empty string where there is no error."""
    found = []
    for arguments in flags:
        try:
            main(arguments, prog="train.py")
        except UserError as error:
            found.append(str(error))
        else:
            found.append("")
    return found
