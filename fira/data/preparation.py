"""Preparation of a corpus: tokenizer, validation split, packed tokens and the summary."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

from tokenizers import Tokenizer

from fira.data.cache import total_size
from fira.data.document_index import index_of, open_index
from fira.data.packed import PackedTokens, Source, TokenSpan
from fira.data.pieces import split_long
from fira.data.sources import input_files
from fira.data.summary import summarise
from fira.data.text_packing import PROGRESS, TextPacker, fraction
from fira.data.text_stream import TextStream
from fira.data.token_shards import Shards, find_shards
from fira.data.tokenizer import TOKENIZER, library_errors, load_tokenizer, train_tokenizer, vocabulary
from fira.errors import UserError
from fira.progress_bar import progress_bar

TOKENIZER_BYTES = 64e6  # size of the sample; more text hardly changes the merges


@dataclass(frozen=True)
class Input:
    """A source of `data`. files: with the content that determines its tokens. shards: None for text."""

    data: str | None
    weight: float
    files: list[Path]
    shards: Shards | None

    @classmethod
    def find(cls, data: str | None, weight: float) -> Self:
        shards = find_shards(data)
        return cls(data, weight, shards.files if shards else input_files(data), shards)

    @contextmanager
    def documents(
        self, text_column: str, label: str, progress: bool, first: int = 0, before: int = 0
    ) -> Iterator[TextStream]:
        """Context manager that returns the documents of text, see `TextStream`, and shows a progress bar."""
        with progress_bar(total_size(self.files), label, progress) as bar:
            bar.initial = bar.n = total_size(self.files[:first])
            yield TextStream(self.data, self.files, text_column, bar.update, first, before)

    def source(self, folder: Path, number: int) -> Source:
        """Return the tokens. Shards are read in place, the tokens of text from `folder`."""
        train, val = ([TokenSpan(folder / f"{split}-{number}.npy")] for split in ("train", "val"))
        if self.shards:
            train, val = self.shards.train, self.shards.val
        return Source(self.weight, PackedTokens(train), PackedTokens(val))


@dataclass(frozen=True)
class Preparation:
    """Writes the tokens, the tokenizer and the summary of all sources to a folder.

    The folder may contain the files of a preparation of the same sources that was killed, which is continued.
    """

    folder: Path
    inputs: list[Input]
    text_column: str
    vocab_size: int
    progress: bool

    def run(self, tokenizer: Tokenizer | None, tokenizer_path: str | Path | None) -> None:
        """Write tokens, summary.json and, where no tokenizer is given, tokenizer.json.

        tokenizer_path: the file of the tokenizer, for messages.
        """
        texts = [entry for entry in self.inputs if entry.shards is None]
        if texts and not tokenizer:
            if len(texts) < len(self.inputs):
                raise UserError("--data mixes text with shards of tokens; give the --tokenizer of the shards")
            path = self.folder / TOKENIZER
            tokenizer = load_tokenizer(path) if path.exists() else self.train_tokenizer(path)
        packer = TextPacker(self.folder, tokenizer, self.vocab_size) if texts and tokenizer else None
        sources, summaries = [], []
        for number, entry in enumerate(self.inputs):
            if entry.shards is None:
                assert packer
                counts = packer.pack(number, partial(entry.documents, self.text_column, "tokenizing", self.progress))
            else:
                counts = dict.fromkeys(("documents", "bytes", "words", "tokens_per_word"))
                largest, path = _check_shards(entry.shards, self.progress)
                if largest >= self.vocab_size:
                    raise UserError(
                        f"{tokenizer_path}: {vocabulary(tokenizer)} tokens, but {path} contains token id {largest}; "
                        "give the tokenizer of the shards as --tokenizer"
                        if tokenizer
                        else f"{path}: token id {largest}, --vocab-size {self.vocab_size}; give at least {largest + 1}"
                    )
            source = entry.source(self.folder, number)
            counts |= {"train_tokens": len(source.train), "val_tokens": len(source.val)}
            if min(len(source.train), len(source.val)) < 3:
                tokens = f"{len(source.train)} + {len(source.val)} tokens"
                raise UserError(f"{entry.data}: {tokens} are too few to train on; give more text")
            sources.append(source)
            summaries.append(counts)
        summary = summarise(sources, summaries)
        (self.folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        (self.folder / PROGRESS).unlink(missing_ok=True)

    def train_tokenizer(self, path: Path) -> Tokenizer:
        """Train on the text, or on a random sample of a large text, and save the tokenizer.

        With several sources, documents of a small source are repeated until they have its share, as in training.
        """
        sizes = [max(total_size(entry.files), 1) for entry in self.inputs]
        total = max(size / entry.weight for size, entry in zip(sizes, self.inputs, strict=True))
        repeats = [
            entry.weight * min(total, TOKENIZER_BYTES) / size for size, entry in zip(sizes, self.inputs, strict=True)
        ]

        def sample() -> Iterator[str]:
            for entry, repeat in zip(self.inputs, repeats, strict=True):
                with entry.documents(self.text_column, "reading for the tokenizer", self.progress) as texts:
                    for number, text in enumerate(texts):
                        if number == 0 or fraction(text.encode()) > 1 - repeat:  # at least one document of each source
                            for _ in range(max(1, round(repeat))):
                                yield from split_long(text)

        with library_errors("the tokenizer cannot be trained on the text"):
            tokenizer = train_tokenizer(sample(), self.vocab_size)
        unfinished = path.with_suffix(".tmp")  # a killed process leaves no part of a tokenizer
        unfinished.write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
        unfinished.replace(path)
        return tokenizer


def _check_shards(shards: Shards, progress: bool) -> tuple[int, Path]:
    """Return the largest token, and its file.

    Raises UserError if an index does not describe its file, or for a negative token.
    """
    largest = 0, shards.tokens[0]
    with progress_bar(total_size(shards.tokens), "checking the shards", progress) as bar:
        for path in shards.tokens:
            if index := index_of(path):
                open_index(path, index).check()
            for ids in PackedTokens([TokenSpan(path)]).chunks():
                if ids.min() < 0:
                    raise UserError(f"{path}: token id {ids.min()}; give a file of token ids")
                largest = max(largest, (int(ids.max()), path))
            bar.update(path.stat().st_size)
    return largest
