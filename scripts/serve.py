"""Serve a model over HTTP: the same as `fira serve`."""

from fira.cli import run
from fira.commands.serve import main

if __name__ == "__main__":
    run(main)
