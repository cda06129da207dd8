"""The command `fira`, which runs one of the modules of this folder."""

import sys
from importlib import import_module
from importlib.metadata import version

from fira import cli
from fira.errors import UserError
from pipeline.mpi.world import init, is_launched

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


def main() -> None:
    cli.run(run_command)


def run_command() -> None:
    """Run the command that the first argument names with the arguments after it."""
    name = sys.argv[1] if len(sys.argv) > 1 else None
    if name in COMMANDS:
        import_module(f"fira.commands.{name}").main(sys.argv[2:], prog=f"fira {name}")
    elif name in ("-h", "--help"):
        print("usage: fira COMMAND [--help] …\n")
        print("\n".join(f"  {command:9} {description}" for command, description in COMMANDS.items()))
    elif name == "--version":
        print(f"fira {version('fira')}")
    else:
        found = f"unknown command {name}" if name else "no command given"
        if is_launched():
            init()  # so that the error is printed once
        raise UserError(f"fira: {found}; choose from {', '.join(COMMANDS)}, or see fira --help")
