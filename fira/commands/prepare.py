"""Tokenize a corpus ahead of training."""

import shlex
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fira import cli
from fira.files import errors_naming, read, replace
from fira.value_types import PathName, Tokens

if TYPE_CHECKING:
    from fira.data.corpus import Corpus

TOKENIZER = "a tokenizer.json, or tiktoken's o200k_base or r50k_base; default: that of shards, or one is trained"
DATA = """text file, folder, CSV, JSONL, Parquet, folder of *_train_*.npy and *_val_*.npy shards, or the name of a
Hugging Face dataset; several with weights as A=0.7,B=0.3; default: the source of the Python standard library"""


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    parser = cli.Parser(__doc__, prog)
    add_arguments(parser)
    options = parser.start(arguments)
    from fira.data.corpus import prepare
    from fira.data.tokenizer_choice import choose_tokenizer

    tokenizer = choose_tokenizer(options.tokenizer, options.data)
    settings = (options.data, options.text_column, tokenizer, options.vocab_size, options.cache)
    corpus = prepare(*settings, progress=not options.quiet)
    summary = dict(corpus.summary)
    for source in summary.pop("sources", []):
        print(f"{source.pop('data')}, {source.pop('weight'):.1%} of the sequences")
        print_counts(source)
    print_counts(summary)
    if options.out:
        copy_files(corpus, Path(options.out))
    print(f"{'kept in':>15}  {corpus.folder}")
    if not options.quiet:
        print(f"\nTrain on it:\n{shlex.join(training_command(options))}")


def add_arguments(parser: cli.Parser) -> None:
    parser.add_argument("--data", type=str, help=DATA)
    parser.add_argument("--text-column", type=str, default="text", help="column of the text (default: %(default)s)")
    parser.add_argument("--tokenizer", type=PathName, help=TOKENIZER)
    parser.add_argument(
        "--vocab-size", type=Tokens, default=2048, help="vocabulary of the model (default: %(default)s)"
    )
    parser.add_argument("--cache", type=PathName, help="folder for results; default: $FIRA_CACHE or ~/.cache/fira")
    out_help = "a folder for copies of tokenizer.json and of these counts as summary.json"
    parser.add_argument("--out", type=PathName, metavar="DIR", help=out_help)


def copy_files(corpus: "Corpus", out: Path) -> None:
    """Copy the tokenizer, if there is one, and the summary to a folder."""
    with errors_naming(out):
        out.mkdir(parents=True, exist_ok=True)
    for path in (corpus.tokenizer, corpus.folder / "summary.json"):
        if path:
            replace(out / path.name, read(path))


def print_counts(counts: dict[str, int | float | None]) -> None:
    """Print a line per count that is not None."""
    for name, value in counts.items():
        if value is not None:
            unit = " nats per token" if name in ("unigram", "trigram") else ""
            number = f"{value:,}" if isinstance(value, int) else f"{value:.3f}{unit}"
            print(f"{name.replace('_', ' '):>15}  {number}")


def training_command(options: Namespace) -> list[str]:
    """The command that trains with the same settings and therefore finds the prepared corpus in the cache."""
    command = ["mpirun", "-np", "4", *cli.command_words("train")]
    for name in ("data", "text_column", "tokenizer", "vocab_size"):
        if (value := getattr(options, name)) is not None:
            command += [f"--{name.replace('_', '-')}", str(value)]
    return ["env", f"FIRA_CACHE={options.cache}", *command] if options.cache else command
