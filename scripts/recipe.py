"""Run a recipe: the same as `fira recipe`."""

from fira.cli import run
from fira.commands.recipe import main

if __name__ == "__main__":
    run(main, parallel=True)
