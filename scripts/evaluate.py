"""Evaluate a model: the same as `fira evaluate`."""

from fira.cli import run
from fira.commands.evaluate import main

if __name__ == "__main__":
    run(main)
