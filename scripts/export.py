"""Export a model to transformers: the same as `fira export`."""

from fira.cli import run
from fira.commands.export import main

if __name__ == "__main__":
    run(main)
