"""Write a job script for Slurm: the same as `fira slurm`."""

from fira.cli import run
from fira.commands.slurm import main

if __name__ == "__main__":
    run(main)
