"""Validation loss against seconds of training.

    python -m benchmarks.time_to_loss.run corpus                        # the command of the main README, and variants
    python -m benchmarks.time_to_loss.run characters --text FILE        # tiny Shakespeare, against a plain dense GPT
    python -m benchmarks.time_to_loss.run                               # only the table and the picture

The contenders take turns, a run per seed each. Seconds are those of training steps, without validation, checkpoints
and the start. New runs replace theirs in results.csv; then the table of all runs is printed and results.png drawn.
"""

import argparse
from functools import partial
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from benchmarks.time_to_loss.contenders import characters, corpus
from benchmarks.time_to_loss.report import HERE, report

RECORDS = ("corpus", "characters")
RESULTS = HERE / "results.csv"
COLUMNS = ["record", "contender", "seed", "step", "seconds", "loss"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", nargs="?", choices=RECORDS)
    parser.add_argument("--text", type=Path, help="tiny Shakespeare, for characters")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="default: 1 2 3 4 5")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="contenders; default: all of the record")
    options = parser.parse_args()
    if options.record == "characters" and not options.text:
        parser.error("characters needs --text, the file of tiny Shakespeare")
    rows = pd.read_csv(RESULTS) if RESULTS.exists() else pd.DataFrame(columns=COLUMNS)
    records = {None: dict, "corpus": corpus, "characters": partial(characters, options.text)}
    contenders = records[options.record]()
    if unknown := set(options.only or ()) - set(contenders):
        parser.error(f"--only: no contender {', '.join(sorted(unknown))}; choose from {', '.join(contenders)}")
    turns = [(seed, name) for seed in options.seeds for name in contenders if name in (options.only or contenders)]
    for seed, name in tqdm(turns, disable=None):
        new = [[options.record, name, seed, *measurement] for measurement in contenders[name](seed)]
        rows = pd.concat([rows, pd.DataFrame(new, columns=COLUMNS)])
        rows = rows.drop_duplicates(COLUMNS[:4], keep="last")
        rows.to_csv(RESULTS, index=False)
    report(pd.read_csv(RESULTS))


if __name__ == "__main__":
    main()
