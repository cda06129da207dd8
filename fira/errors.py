"""The exception for invalid input."""


class UserError(Exception):
    """Raised for invalid input. The message is one line that states what is wrong, where, and what to do.

    Commands print the line without a traceback and end all ranks with exit status 2.
    """
