"""Evaluate a model on texts, on tasks in JSONL files and on tasks of lm-eval, and count the tokens of each expert."""

from argparse import Namespace
from collections.abc import Sequence

from fira import cli
from fira.errors import UserError
from fira.generation.options import add_checkpoint, add_quantize
from fira.value_types import PathName, Sequences


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    parser = cli.Parser(__doc__, prog)
    add_arguments(parser)
    options = parser.start(arguments)
    check(options)
    from fira.commands.evaluation_report import report

    report(options)


def check(options: Namespace) -> None:
    """Raise UserError if the flags do not fit together."""
    if not options.data and not options.tasks:
        raise UserError("nothing to evaluate; give --data or --tasks")


def add_arguments(parser: cli.Parser) -> None:
    add_checkpoint(parser)
    data_help = "text, CSV, JSONL, Parquet, or folders"
    parser.add_argument("--data", type=str, nargs="+", default=[], metavar="FILE", help=data_help)
    parser.add_argument("--text-column", type=str, default="text", help="column of the text (default: %(default)s)")
    mask_help = "keep the documents of --data apart, as in training with --document-mask"
    parser.add_argument("--document-mask", action="store_true", help=mask_help)
    tasks_help = "comma-separated JSONL files of examples and names of lm-eval tasks (pip install -e '.[eval]')"
    parser.add_argument("--tasks", type=str, metavar="TASKS", help=tasks_help)
    folder_help = "a folder of task files of lm-eval; default: its own"
    parser.add_argument("--tasks-path", type=PathName, metavar="DIR", help=folder_help)
    parser.add_argument("--plot", type=PathName, metavar="PNG", help="draw a bar chart of the accuracies in the tasks")
    out_help = "a folder for evaluation.json; default, with --tasks: the run folder of the checkpoint, or the export"
    parser.add_argument("--out", type=PathName, metavar="DIR", help=out_help)
    parser.add_argument("--limit", type=int, help="examples of each task; default: all")
    parser.add_argument(
        "--batch-size", type=Sequences, default=8, help="examples per forward pass (default: %(default)s)"
    )
    add_quantize(parser)
