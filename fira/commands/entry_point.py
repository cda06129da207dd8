"""The command `fira`, which runs one of the modules of this folder."""

import sys
from importlib import import_module
from importlib.metadata import version

from fira import cli
from fira.errors import UserError

COMMANDS = {  # the first line of each module's docstring; a module is imported only to run its command
    "train": "Train a Mixture-of-Experts language model, split into pipeline stages over the ranks of mpirun.",
    "generate": "Continue a prompt with a trained model, or evaluate how well the model predicts a text.",
    "chat": "Chat with a trained model.",
    "evaluate": "Evaluate a model on files and on tasks of lm-eval, and count the tokens of each expert.",
    "prepare": "Tokenize a corpus ahead of training.",
    "plan": "Find the fastest layout of a model for a number of ranks before a run.",
    "plot": "Draw the training log of one run, of several runs in one picture, or the experts of a run.",
    "doctor": "Say what this machine can do, and what to do about each problem.",
    "export": "Write a trained model as a folder that transformers loads.",
}


PARALLEL = ("train", "plan", "doctor")  # the commands that all ranks run together


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    cli.run(lambda: run_command(name, sys.argv[2:]), parallel=name in PARALLEL)


def run_command(name: str, arguments: list[str]) -> None:
    """Run a command, or print the help or the version."""
    if name in COMMANDS:
        import_module(f"fira.commands.{name}").main(arguments, prog=f"fira {name}")
    elif name in ("-h", "--help"):
        print("usage: fira COMMAND [--help] …\n")
        print("\n".join(f"  {command:9} {description}" for command, description in COMMANDS.items()))
    elif name == "--version":
        print(f"fira {version('fira')}")
    else:
        found = f"unknown command {name}" if name else "no command given"
        raise UserError(f"fira: {found}; choose from {', '.join(COMMANDS)}, or see fira --help")
