"""Draw training logs: the same as `fira plot`."""

from fira.cli import run
from fira.commands.plot import main

if __name__ == "__main__":
    run(main)
