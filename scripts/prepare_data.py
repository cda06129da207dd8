"""Tokenize a corpus ahead of training: python scripts/prepare_data.py --data my_texts/"""

import shlex
from argparse import Namespace

from fira import cli
from fira.data.prepare import prepare

DATA = """text file, folder, CSV, JSONL, Parquet, folder of *_train_*.npy and *_val_*.npy shards, or the name of a
Hugging Face dataset; several with weights as A=0.7,B=0.3; left out, the Python standard library's source"""


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--data", help=DATA)
    parser.add_argument("--text-column", default="text", help="column or key of the text (default: %(default)s)")
    parser.add_argument("--tokenizer", help="a tokenizer.json; left out, one is trained on the text")
    parser.add_argument("--vocab-size", type=int, default=2048, help="of the model (default: %(default)s)")
    parser.add_argument("--cache", help="where results are kept; left out, $FIRA_CACHE or ~/.cache/fira")
    options = parser.parse_args()
    corpus = prepare(options.data, options.text_column, options.tokenizer, options.vocab_size, options.cache)
    summary = dict(corpus.summary)
    for source in summary.pop("sources", []):
        print(f"{source.pop('data')}, {source.pop('weight'):.1%} of the sequences")
        _print(source)
    _print(summary)
    print(f"{'kept in':>15}  {corpus.folder}\n\nTrain on it:\n{shlex.join(_training(options))}")


def _print(counts: dict[str, int | float | None]) -> None:
    for name, value in counts.items():
        if value is not None:
            unit = " nats per token" if name in ("unigram", "trigram") else ""
            number = f"{value:,}" if isinstance(value, int) else f"{value:.3f}{unit}"
            print(f"{name.replace('_', ' '):>15}  {number}")


def _training(options: Namespace) -> list[str]:
    """The command that trains with the same settings, and so finds the result."""
    command = ["mpirun", "-np", "4", "python", "scripts/train.py"]
    for name in ("data", "text_column", "tokenizer", "vocab_size"):
        if (value := getattr(options, name)) is not None:
            command += [f"--{name.replace('_', '-')}", str(value)]
    return ["env", f"FIRA_CACHE={options.cache}", *command] if options.cache else command


if __name__ == "__main__":
    cli.run(main)
