"""A progress bar with the time that remains: drawn in place on a terminal, a line every few seconds in a log."""

import sys

from tqdm import tqdm


class _Lines:
    """What tqdm would draw over the line before becomes a line of its own."""

    def write(self, text: str) -> None:
        if line := text.strip("\r\n "):
            print(line, file=sys.stderr)

    def flush(self) -> None:
        sys.stderr.flush()


def progress_bar(total: int, label: str, shown: bool) -> tqdm:
    """A bar over `total` bytes or tokens that appears when the work takes more than a few seconds."""
    terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        desc=label,
        unit_scale=True,
        unit="",
        disable=not shown,
        delay=2,
        mininterval=0.2 if terminal else 5,
        file=sys.stderr if terminal else _Lines(),
        dynamic_ncols=terminal,
    )
