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


FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}]"  # never seconds per unit


def progress_bar(total: int, label: str, shown: bool, unit: str = "B") -> tqdm:
    """A bar over `total` bytes, or other units such as " tokens", which appears after two seconds if `shown`."""
    terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        desc=label,
        unit_scale=total >= 1000,  # small counts are integers
        unit=unit,
        bar_format=FORMAT,
        disable=not shown,
        delay=2,
        mininterval=0.2 if terminal else 5,
        file=sys.stderr if terminal else _Lines(),
        dynamic_ncols=terminal,
    )
