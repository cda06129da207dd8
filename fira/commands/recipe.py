"""Run the stages of a recipe, from data to an exported model, and write a report. Unchanged stages are skipped."""

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pipeline
from fira import cli
from fira.commands.entry_point import parse_arguments, run_command
from fira.errors import UserError
from fira.training.config import SUPERVISED
from fira.training.flags import train_config
from fira.value_types import PathName
from pipeline.mpi.launchers import launched_rank

if TYPE_CHECKING:
    from fira.recipes.recipe_file import Recipe

STAGES = ("questions", "prepare", "train", "evaluate", "export")  # commands that write to --out
PROGRAM = "from fira.commands.entry_point import main; main()"


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    parser = cli.Parser(__doc__, prog)
    parser.add_argument("recipe", type=PathName, metavar="TOML", help="a file such as recipes/chat-tiny.toml")
    out_help = "folder of all outputs; default: that of the file, or runs/ and its name"
    parser.add_argument("--out", type=PathName, metavar="DIR", help=out_help)
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--list", action="store_true", help="print the stages and their states, and exit")
    instead.add_argument("--dry-run", action="store_true", help="print the commands of the stages, and exit")
    instead.add_argument("--report", action="store_true", help="write the report of what has been run, and exit")
    options = parser.start(arguments)
    from fira.recipes.recipe_file import read_recipe

    recipe = read_recipe(Path(options.recipe), options.out, check_arguments)
    if not (options.list or options.dry_run or options.report):
        run(recipe, options)
    elif not launched_rank():
        print(answer(recipe, options))


def answer(recipe: "Recipe", options: Namespace) -> str:
    """What is printed instead of running the stages: their states, their commands, or the path of the report."""
    if options.dry_run:
        return "\n".join(map(recipe.command_line, recipe.stages))
    if options.list:
        from fira.recipes.eta import overview

        return overview(recipe)
    from fira.recipes.report import write_report

    return f"report: {write_report(recipe)}"


def run(recipe: "Recipe", options: Namespace) -> None:
    """Run the stages on the ranks of mpirun, and write the report."""
    trained = [stage for stage in recipe.stages if stage.command == "train"]
    timeouts = [float(str(stage.flags["timeout"])) for stage in trained if "timeout" in stage.flags]
    cuda = any(stage.flags.get("device") != "cpu" for stage in trained)
    world = pipeline.init(max(timeouts, default=None), cuda)  # the longest timeout is that of all stages
    cli.start_logging(options.quiet, options.verbose, world.rank)
    from fira.metrics.console import next_command
    from fira.recipes.run_stages import Commands, run_child, run_stages

    flags = [flag for flag, given in (("--quiet", options.quiet), ("--verbose", options.verbose)) if given]
    program = [sys.executable, "-c", PROGRAM]
    commands = Commands(lambda words: run_command("train", [*words, *flags]), program, flags or ["--quiet"])
    if run_stages(recipe, world, commands):
        run_child([*program, "recipe", options.recipe, "--report", f"--out={recipe.out}"], "the report")
        if trained and world.rank == 0 and not options.quiet:
            chats = trained[-1].flags.get("objective", "pretrain") != "pretrain"
            print(next_command(recipe.output(trained[-1].name), has_tokenizer=True, chats=chats))


def check_arguments(command: str, arguments: Sequence[str]) -> None:
    """Parse the arguments of a stage. Raises UserError if they are invalid, or if the command cannot be a stage."""
    if command not in STAGES:
        raise UserError(f"unknown command {command}; choose from {', '.join(STAGES)}")
    options = parse_arguments(command, arguments)
    if command == "train":
        config = train_config(options)
        config.recipe()
        config.model_changes()
        for name in ("resume", *SUPERVISED):
            if getattr(config, name) is not None:
                raise UserError(f"{name} is not a key of a stage; a recipe resumes and starts its stages itself")
