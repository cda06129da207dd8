"""Continue a prompt: the same as `fira generate`."""

from fira.cli import run
from fira.commands.generate import main

if __name__ == "__main__":
    run(main)
