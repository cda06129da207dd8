"""Train a model: the same as `fira train`."""

from fira.cli import run
from fira.commands.train import main

if __name__ == "__main__":
    run(main, parallel=True)
