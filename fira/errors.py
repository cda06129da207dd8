"""The one exception that is the user's to mend."""


class UserError(Exception):
    """Something the user gave cannot be used. The message is one line: what, where, and what to do.

    Scripts print the line without a traceback and end every rank with status 2.
    """
