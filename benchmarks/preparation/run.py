"""Throughput of the preparation of text, compared with the tokenizers library alone on all cores.

    python -m benchmarks.preparation.run [--megabytes 24] [--rounds 5]

The contenders take turns in one process. Those of the library tokenize documents that are in memory, and drop the
result. Those of Fira read a file; the last one starts with an empty cache.
"""

import argparse
import csv
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path

from tokenizers import Tokenizer

from benchmarks.measure import environment
from fira.data.corpus import prepare
from fira.data.preparation import Input
from fira.data.sources import documents
from fira.data.text_packing import TextPacker
from fira.data.tokenizer import train_tokenizer

RESULTS = Path(__file__).with_name("results.csv")
BATCH = 1000  # documents that the library gets at once, as in its documentation
VOCABULARY = 8192


def texts(megabytes: float) -> list[str]:
    """The source of the standard library and the language reference, repeated with a number in each document."""
    result, size = [], 0.0
    for number, text in enumerate(cycle(documents(None, ""))):
        if size > megabytes * 1e6:
            return result
        result.append(f"# {number}\n{text}")
        size += len(result[-1].encode())
    raise AssertionError


def library(encode: Callable[..., object], batches: list[list[str]]) -> None:
    for batch in batches:
        encode(batch, add_special_tokens=False)


def pack(path: Path, tokenizer: Tokenizer) -> None:
    """Read, tokenize, divide and write, without the hash of the input and the n-gram baselines."""
    entry = Input.find(str(path), 1.0)
    with tempfile.TemporaryDirectory() as folder:
        TextPacker(Path(folder), tokenizer, VOCABULARY).pack(
            0, lambda first, before: entry.documents("text", "", False, first, before)
        )


def whole(path: Path, tokenizer: Path) -> None:
    with tempfile.TemporaryDirectory() as cache:
        prepare(str(path), "text", tokenizer, VOCABULARY, cache, progress=False)


def seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    found = texts(options.megabytes)
    size = sum(len(text.encode()) for text in found) / 1e6
    tokenizer = train_tokenizer(islice(found, 500), VOCABULARY)
    batches = [found[start : start + BATCH] for start in range(0, len(found), BATCH)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer.save(str(folder / "tokenizer.json"))
        path = folder / "texts.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in found))
        contenders: dict[str, Callable[[], object]] = {
            "encode_batch": lambda: library(tokenizer.encode_batch, batches),
            "encode_batch_fast": lambda: library(tokenizer.encode_batch_fast, batches),
            "read, tokenize, write": lambda: pack(path, tokenizer),
            "prepare": lambda: whole(path, folder / "tokenizer.json"),
        }
        rows = []
        for number in range(options.rounds + 1):
            rows.append([size / seconds(run) for run in contenders.values()])
            line = "  ".join(f"{name} {speed:.2f}" for name, speed in zip(contenders, rows[-1], strict=True))
            print(f"{line} MB/s" + ("" if number else ", not counted"), flush=True)
    with RESULTS.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(contenders)
        writer.writerows([f"{speed:.3f}" for speed in row] for row in rows[1:])
    print(f"{environment()}, {len(os.sched_getaffinity(0))} cores, {len(found)} documents, {size:.1f} MB")
    for own, base in ((2, 0), (2, 1), (3, 0), (3, 1)):
        ratios = [row[own] / row[base] for row in rows[1:]]
        names = [*contenders]
        print(f"{names[own]} / {names[base]}: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
