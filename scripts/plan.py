"""Find the fastest layout: the same as `fira plan`."""

from fira.cli import run
from fira.commands.plan import main

if __name__ == "__main__":
    run(main, parallel=True)
