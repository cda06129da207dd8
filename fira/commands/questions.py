"""Write texts, chats, preferences and test questions about the functions of the installed Python."""

from collections.abc import Sequence
from pathlib import Path

from fira import cli
from fira.value_types import PathName


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    parser = cli.Parser(__doc__, prog)
    add_arguments(parser)
    options = parser.start(arguments)
    from fira.data.python_questions import write_questions
    from fira.data.sources import input_files

    counts = write_questions(Path(options.out), input_files(None))
    for name, count in counts.items():
        print(f"{name + '.jsonl':>25}  {count:,}")
    if not options.quiet:
        texts = ",".join(f"{options.out}/{name}.jsonl=0.5" for name in ("source", "documentation"))
        print(f"next: {' '.join(cli.command_words('train'))} --data {texts}")


def add_arguments(parser: cli.Parser) -> None:
    parser.add_argument("--out", type=PathName, required=True, help="folder for the JSON Lines files")
