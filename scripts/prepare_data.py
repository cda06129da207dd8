"""Tokenize a corpus ahead of training: python scripts/prepare_data.py --data my_texts/"""

import argparse
import re
import shlex
import sys

from fira.data.prepare import prepare
from fira.errors import UserError

DATA = """text file, folder, CSV, JSONL, Parquet, folder of *_train_*.npy and *_val_*.npy shards, or the name of a
Hugging Face dataset; left out, the Python standard library's source"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", help=DATA)
    parser.add_argument("--text-column", default="text", help="column (CSV, Parquet) or key (JSONL) of the text")
    parser.add_argument("--tokenizer", help="a tokenizer.json; left out, one is trained on the text")
    parser.add_argument("--vocab-size", type=int, default=4096, help="size of the model's vocabulary")
    parser.add_argument("--cache", help="where results are kept; left out, $FIRA_CACHE or ~/.cache/fira")
    flags = [re.sub("^--[^=]+", lambda flag: flag[0].replace("_", "-"), word) for word in sys.argv[1:]]
    options = parser.parse_args(flags)
    try:
        corpus = prepare(options.data, options.text_column, options.tokenizer, options.vocab_size, options.cache)
    except UserError as error:
        print(f"prepare_data.py: {error}", file=sys.stderr)
        sys.exit(2)

    for name, value in corpus.summary.items():
        if value is not None:
            print(f"{name:>12}  {value:,}" if isinstance(value, int) else f"{name:>12}  {value:.3f} nats per token")
    print(f"{'kept in':>12}  {corpus.folder}\n\nTrain on it:\n{shlex.join(_training(options))}")


def _training(options: argparse.Namespace) -> list[str]:
    """The command that trains with the same settings, and so finds the result."""
    command = ["mpirun", "-np", "4", "python", "scripts/train.py"]
    for name in ("data", "text_column", "tokenizer", "vocab_size"):
        if (value := getattr(options, name)) is not None:
            command += [f"--{name.replace('_', '-')}", str(value)]
    return ["env", f"FIRA_CACHE={options.cache}", *command] if options.cache else command


if __name__ == "__main__":
    main()
