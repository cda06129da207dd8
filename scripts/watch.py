"""Show runs in progress on a local web page: the same as `fira watch`."""

from fira.cli import run
from fira.commands.watch import main

if __name__ == "__main__":
    run(main)
