"""Preparation of a corpus: tokenizer, validation split, packed tokens and the summary."""

import hashlib
import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tokenizers import Tokenizer

from fira.data.cache import total_size
from fira.data.packed import PackedTokens, Source, TokenWriter, find_shards
from fira.data.pieces import encode_documents, split_long
from fira.data.sources import input_files, read_files
from fira.data.summary import Summary, summarise
from fira.data.tokenizer import TOKENIZER, eos_id, library_errors, train_tokenizer
from fira.errors import UserError
from fira.progress_bar import progress_bar

VALIDATION = 0.05  # fraction of the documents
TOKENIZER_BYTES = 64e6  # size of the sample; more text hardly changes the merges


@dataclass(frozen=True)
class Input:
    """A source of `data`. shards: the number of its files that are training shards; None for text."""

    data: str | None
    weight: float
    files: list[Path]
    shards: int | None

    @classmethod
    def find(cls, data: str | None, weight: float) -> Self:
        if shards := find_shards(data):
            return cls(data, weight, shards[0] + shards[1], len(shards[0]))
        return cls(data, weight, input_files(data), None)

    def documents(self, text_column: str, label: str, progress: bool) -> Iterator[str]:
        """Yield the documents of text, with a progress bar."""
        with progress_bar(total_size(self.files), label, progress) as bar:
            yield from read_files(self.data, self.files, text_column, bar.update)

    def source(self, folder: Path, number: int) -> Source:
        """Return the tokens. Shards are read in place, the tokens of text from `folder`."""
        train, val = self.files[: self.shards], self.files[self.shards :]
        if self.shards is None:
            train, val = ([folder / f"{split}-{number}.npy"] for split in ("train", "val"))
        return Source(self.weight, PackedTokens(train), PackedTokens(val))


@dataclass(frozen=True)
class Preparation:
    """Writes the tokens, the tokenizer and the summary of all sources to a folder."""

    folder: Path
    inputs: list[Input]
    text_column: str
    vocab_size: int
    progress: bool

    def run(self, tokenizer: Tokenizer | None) -> None:
        """Write tokens, summary.json and, where no tokenizer is given, tokenizer.json."""
        texts = [entry for entry in self.inputs if entry.shards is None]
        if texts and not tokenizer:
            if len(texts) < len(self.inputs):
                raise UserError("--data mixes text with shards of tokens; give the --tokenizer of the shards")
            tokenizer = self.train_tokenizer()
        sources, summaries = [], []
        for number, entry in enumerate(self.inputs):
            if entry.shards is None:
                assert tokenizer
                counts = self.pack(entry, number, tokenizer)
            else:
                counts = dict.fromkeys(("documents", "bytes", "words", "tokens_per_word"))
                _check_ids(entry.files, self.vocab_size, self.progress)
            source = entry.source(self.folder, number)
            counts |= {"train_tokens": len(source.train), "val_tokens": len(source.val)}
            if min(len(source.train), len(source.val)) < 3:
                tokens = f"{len(source.train)} + {len(source.val)} tokens"
                raise UserError(f"{entry.data}: {tokens} are too few to train on; give more text")
            sources.append(source)
            summaries.append(counts)
        summary = summarise(sources, summaries)
        (self.folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")

    def train_tokenizer(self) -> Tokenizer:
        """Train on the text, or on a random sample of a large text, and save tokenizer.json.

        With several sources, documents of a small source are repeated until they have its share, as in training.
        """
        sizes = [max(total_size(entry.files), 1) for entry in self.inputs]
        total = max(size / entry.weight for size, entry in zip(sizes, self.inputs, strict=True))
        repeats = [
            entry.weight * min(total, TOKENIZER_BYTES) / size for size, entry in zip(sizes, self.inputs, strict=True)
        ]

        def sample() -> Iterator[str]:
            for entry, repeat in zip(self.inputs, repeats, strict=True):
                texts = entry.documents(self.text_column, "reading for the tokenizer", self.progress)
                for number, text in enumerate(texts):
                    if number == 0 or _fraction(text) > 1 - repeat:  # at least the first document of each source
                        for _ in range(max(1, round(repeat))):
                            yield from split_long(text)

        with library_errors("the tokenizer cannot be trained on the text"):
            tokenizer = train_tokenizer(sample(), self.vocab_size)
        (self.folder / TOKENIZER).write_text(tokenizer.to_str(pretty=True), encoding="utf-8")  # OSError if it fails
        return tokenizer

    def pack(self, entry: Input, number: int, tokenizer: Tokenizer) -> Summary:
        """Write the tokens of both splits, with EOS after each document, and return the counts.

        Documents are assigned to a split as a whole, or divided where this does not give VALIDATION approximately.
        """
        eos = eos_id(tokenizer)
        for split in (_by_document, _by_tail):
            count = size = words = tokens = 0
            with (
                TokenWriter(self.folder / f"train-{number}.npy", self.vocab_size) as train,
                TokenWriter(self.folder / f"val-{number}.npy", self.vocab_size) as val,
            ):
                texts = entry.documents(self.text_column, "tokenizing", self.progress)
                for text, ids in encode_documents(tokenizer, texts):
                    tokens += len(ids)
                    for part, writer in zip(split(text, ids), (train, val), strict=True):
                        if part:
                            part.append(eos)
                            writer.append(part)
                    count += 1
                    size += len(text.encode())
                    words += len(text.split())
            if VALIDATION / 3 * train.length < val.length < VALIDATION * 3 * train.length:
                break
        return {"documents": count, "bytes": size, "words": words, "tokens_per_word": tokens / words}


def _fraction(text: str) -> float:
    """Return a hash of the text in [0, 1): equal documents are in the same split, in any order."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest()) / 2**56


def _by_document(text: str, ids: "array[int]") -> tuple["array[int]", "array[int]"]:
    return (array("I"), ids) if _fraction(text) < VALIDATION else (ids, array("I"))


def _by_tail(_text: str, ids: "array[int]") -> tuple["array[int]", "array[int]"]:
    """Use the end of each document for validation; for corpora of few or of many equal documents."""
    cut = len(ids) - max(1, round(len(ids) * VALIDATION))
    return ids[:cut], ids[cut:]


def _check_ids(shards: list[Path], vocab_size: int, progress: bool) -> None:
    with progress_bar(total_size(shards), "checking the shards", progress) as bar:
        for path in shards:
            for ids in PackedTokens([path]).chunks():
                if len(ids) and not 0 <= ids.min() <= ids.max() < vocab_size:
                    invalid = ids.max() if ids.max() >= vocab_size else ids.min()
                    raise UserError(
                        f"{path}: token id {invalid}, --vocab-size {vocab_size}; give a larger vocabulary size"
                    )
            bar.update(path.stat().st_size)
