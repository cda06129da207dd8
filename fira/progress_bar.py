"""Progress bar with the remaining time: drawn in place on a terminal, otherwise printed every few seconds."""

import sys

from tqdm import tqdm


class _Lines:
    """File object that prints each state of a tqdm bar as a separate line on stderr."""

    def write(self, text: str) -> None:
        if line := text.strip("\r\n "):
            sys.stderr.write(line + "\n")  # print would write the end of the line separately

    def flush(self) -> None:
        sys.stderr.flush()


def progress_bar(total: int, label: str, shown: bool) -> tqdm:
    """A bar over `total` bytes, tokens or sequences, which appears after two seconds if `shown`."""
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
