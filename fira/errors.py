"""The exception for invalid input."""


class UserError(Exception):
    """Raised for invalid input. The message is one line that states what is wrong, where, and what to do.

    Commands print the line without a traceback and end all ranks with exit status 2. Characters that cannot be printed,
    such as a newline in the name of a file, are escaped.
    """

    def __init__(self, message: str) -> None:
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in message))
