"""Write questions about the functions of the installed Python: the same as `fira questions`."""

from fira.cli import run
from fira.commands.questions import main

if __name__ == "__main__":
    run(main)
