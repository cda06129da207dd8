"""Tokenize a corpus ahead of training: the same as `fira prepare`."""

from fira.cli import run
from fira.commands.prepare import main

if __name__ == "__main__":
    run(main)
