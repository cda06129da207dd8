"""Datasets of the Hugging Face Hub by name.

NAME, NAME:CONFIG            the whole train split
NAME[:N], NAME:CONFIG[:N]    a sample of N documents, which is streamed: the other files are not downloaded
"""

import hashlib
import logging
import re
import uuid
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from fira.data.archives import is_archive
from fira.data.cache import cache_folder
from fira.data.compression import format_of
from fira.data.readers import has_reader
from fira.errors import UserError
from fira.files import one_line
from fira.progress_bar import progress_bar

log = logging.getLogger(__name__)

NAME = re.compile(r"([\w.-]+(?:/[\w.-]+)?)(?::([\w.-]+))?(?:\[:(\d+)\])?")
BUFFER = 10_000  # documents among which the next one of a stream is drawn
SEED = 42
ROWS = 1000  # documents that are written together


def dataset_files(data: str) -> list[Path]:
    """Return files with the documents of a dataset, in the cache of `datasets` or, for a sample, in that of Fira.

    Raises UserError if `data` is no name of a dataset, or if there is no such dataset.
    """
    missing = f"{data}: no such file or folder"
    if not (found := parse_name(data)):
        raise UserError(f"{missing}; check the path")
    name, config, count = found.groups()
    sample = cache_folder() / "samples" / f"{_key(data)}.parquet"
    if count and sample.exists():
        return [sample]
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError(f"{missing}; if it is a Hugging Face dataset, pip install datasets") from None
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # no line for each attempt that fails
    options = {"name": config} if config else {}
    try:
        dataset = load_dataset(name, split="train", **options, **({"streaming": True} if count else {}))
    except (OSError, ValueError) as error:
        raise UserError(f"{missing}, and no Hugging Face dataset with a train split ({one_line(error)})") from None
    if not count:
        return [Path(file["filename"]) for file in dataset.cache_files]
    try:
        write_sample(dataset, int(count), sample)
    except Exception as error:  # of the network, of which each library has its own
        raise UserError(f"{data}: the stream ended early ({one_line(error)}); try again") from None
    return [sample]


def parse_name(data: str) -> re.Match[str] | None:
    """Match the name of a dataset, its configuration and the size of the sample; None if `data` looks like a file."""
    path = Path(data)
    like_a_file = has_reader(path) or is_archive(path) or format_of(path) in (".txt", ".md")
    return None if like_a_file else NAME.fullmatch(data)


def _key(data: str) -> str:
    return hashlib.sha256(f"{data} {BUFFER} {SEED}".encode()).hexdigest()


def write_sample(dataset: Any, count: int, path: Path) -> None:
    """Write `count` documents of an IterableDataset to a Parquet file, all if there are fewer.

    The files of the dataset are read in random order, and each document is drawn from a buffer of BUFFER documents.
    """
    import pyarrow.parquet as pq

    stream = dataset.shuffle(seed=SEED, buffer_size=BUFFER).take(count)
    tables: Iterator[Any] = stream.with_format("arrow").iter(batch_size=ROWS)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{uuid.uuid4().hex}")
    try:
        with progress_bar(count, "streaming documents", log.isEnabledFor(logging.INFO)) as bar:
            first = next(tables)
            with pq.ParquetWriter(unfinished, first.schema) as writer:
                for table in chain([first], tables):
                    writer.write_table(table)
                    bar.update(len(table))
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
