"""Say what this machine can do: the same as `fira doctor`."""

from fira.cli import run
from fira.commands.doctor import main

if __name__ == "__main__":
    run(main, parallel=True)
