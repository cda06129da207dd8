"""Tokenize a corpus ahead of training: python scripts/prepare_data.py --data my_texts/"""

import shlex
from argparse import Namespace

from fira import cli
from fira.data.prepare import prepare

DATA = """text file, folder, CSV, JSONL, Parquet, folder of *_train_*.npy and *_val_*.npy shards, or the name of a
Hugging Face dataset; left out, the Python standard library's source"""


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--data", help=DATA)
    parser.add_argument("--text-column", default="text", help="column or key of the text (default: %(default)s)")
    parser.add_argument("--tokenizer", help="a tokenizer.json; left out, one is trained on the text")
    parser.add_argument("--vocab-size", type=int, default=2048, help="of the model (default: %(default)s)")
    parser.add_argument("--cache", help="where results are kept; left out, $FIRA_CACHE or ~/.cache/fira")
    options = parser.parse_args()
    corpus = prepare(options.data, options.text_column, options.tokenizer, options.vocab_size, options.cache)
    for name, value in corpus.summary.items():
        if value is not None:
            print(f"{name:>12}  {value:,}" if isinstance(value, int) else f"{name:>12}  {value:.3f} nats per token")
    print(f"{'kept in':>12}  {corpus.folder}\n\nTrain on it:\n{shlex.join(_training(options))}")


def _training(options: Namespace) -> list[str]:
    """The command that trains with the same settings, and so finds the result."""
    command = ["mpirun", "-np", "4", "python", "scripts/train.py"]
    for name in ("data", "text_column", "tokenizer", "vocab_size"):
        if (value := getattr(options, name)) is not None:
            command += [f"--{name.replace('_', '-')}", str(value)]
    return ["env", f"FIRA_CACHE={options.cache}", *command] if options.cache else command


if __name__ == "__main__":
    cli.run(main)
