"""Chat with a model: the same as `fira chat`."""

from fira.cli import run
from fira.commands.chat import main

if __name__ == "__main__":
    run(main)
