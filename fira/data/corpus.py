"""Prepare a corpus: tokenizer, validation split, packed tokens and n-gram baselines, cached by content hash."""

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from tokenizers import Tokenizer

from fira.data.cache import atomic_folder, cache_folder, content_key, total_size
from fira.data.mixture import parse_mixture
from fira.data.ngram import trigram_loss, unigram_loss
from fira.data.packed import PackedTokens, TokenWriter, find_shards
from fira.data.sources import documents, input_files
from fira.data.tokenizer import TOKENIZER, eos_id, load_tokenizer, train_tokenizer, vocabulary
from fira.errors import UserError
from fira.progress_bar import progress_bar

CORPUS_FORMAT = 2  # part of the cache key; increment it when the same input yields another result
VALIDATION = 0.05  # fraction of the documents
TOKENIZER_BYTES = 64e6  # size of the sample; more text hardly changes the merges
BATCH = 2**20  # characters tokenized together
BASELINE_TOKENS = 10_000_000  # training tokens for the n-gram baselines; a tenth of this for validation tokens

Summary = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """The tokens of a source and its share of the training sequences."""

    weight: float
    train: PackedTokens
    val: PackedTokens


@dataclass(frozen=True)
class Corpus:
    """Tokens to train on.

    tokenizer: the path of the tokenizer.json; None for shards given without one.
    summary: documents, bytes and words (None for shards), train_tokens, val_tokens, tokens_per_word (the tokenizer's
        fertility), unigram and trigram (loss on the validation tokens, nats per token); for several sources, `sources`
        has the counts of each.
    """

    sources: list[Source]
    tokenizer: Path | None
    summary: Summary
    folder: Path


def prepare(
    data: str | None = None,
    text_column: str = "text",
    tokenizer_path: str | Path | None = None,
    vocab_size: int = 4096,
    cache_dir: str | Path | None = None,
    progress: bool = True,
) -> Corpus:
    """Return the corpus of `data`, from the cache where it has been prepared before.

    For the syntax of `data` see `mixture.parse_mixture`, `sources.documents` and `packed.find_shards`. The cache key is
    the SHA-256 of the inputs' content, the tokenizer and the settings. Several processes may prepare the same corpus at
    the same time: each writes to a temporary folder, and the first to finish renames it. `vocab_size` must be at least
    that of the tokenizer. Raises UserError for invalid input.
    """
    cache = Path(cache_dir or cache_folder())
    try:
        given = load_tokenizer(tokenizer_path) if tokenizer_path else None
        if given and vocabulary(given) > vocab_size:
            raise UserError(
                f"{tokenizer_path}: {vocabulary(given)} tokens, --vocab-size {vocab_size}; give at least this number"
            )
        inputs = [_Input.find(source, weight) for source, weight in parse_mixture(data)]
        files = [path for entry in inputs for path in entry.files]
        layout = [[entry.weight, text_column, len(entry.files), entry.shards] for entry in inputs]
        settings = [CORPUS_FORMAT, vocab_size, bool(tokenizer_path), layout]
        tokenizer_files = [Path(tokenizer_path)] if tokenizer_path else []
        folder = cache / content_key(cache, files + tokenizer_files, settings, progress)
        if not folder.is_dir():
            with atomic_folder(folder) as temporary:
                if tokenizer_path:
                    shutil.copy(tokenizer_path, temporary / TOKENIZER)
                _Preparation(temporary, inputs, text_column, vocab_size, progress).run(given)
        tokenizer = folder / TOKENIZER
        summary = json.loads((folder / "summary.json").read_text())
        for entry, counts in zip(inputs, summary.get("sources", ()), strict=False):
            counts |= {"data": entry.data, "weight": entry.weight}  # not cached: equal content may have another name
        return Corpus(
            sources=[entry.source(folder, number) for number, entry in enumerate(inputs)],
            tokenizer=tokenizer if tokenizer.exists() else None,
            summary=summary,
            folder=folder,
        )
    except OSError as error:
        raise UserError(
            f"{error.filename or cache}: {error.strerror or error}; check the path, or set FIRA_CACHE to another folder"
        ) from error


@dataclass(frozen=True)
class _Input:
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

    def source(self, folder: Path, number: int) -> Source:
        """Return the tokens. Shards are read in place, the tokens of text from `folder`."""
        train, val = self.files[: self.shards], self.files[self.shards :]
        if self.shards is None:
            train, val = ([folder / f"{split}-{number}.npy"] for split in ("train", "val"))
        return Source(self.weight, PackedTokens(train), PackedTokens(val))


@dataclass(frozen=True)
class _Preparation:
    """Writes the tokens, the tokenizer and the summary of all sources to a folder."""

    folder: Path
    inputs: list[_Input]
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
        summaries = []
        for number, entry in enumerate(self.inputs):
            if entry.shards is None:
                assert tokenizer
                counts = self.pack(entry, number, tokenizer)
            else:
                counts = dict.fromkeys(("documents", "bytes", "words", "tokens_per_word"))
                _check_ids(entry.files, self.vocab_size, self.progress)
            source = entry.source(self.folder, number)
            summaries.append({**counts, "train_tokens": len(source.train), "val_tokens": len(source.val)})
        _summarise(self.folder, self.inputs, summaries)

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
                for number, text in enumerate(self._documents(entry, "reading for the tokenizer")):
                    if number == 0 or _fraction(text) > 1 - repeat:  # at least the first document of each source
                        yield from [text] * max(1, round(repeat))

        tokenizer = train_tokenizer(sample(), self.vocab_size)
        (self.folder / TOKENIZER).write_text(tokenizer.to_str(pretty=True), encoding="utf-8")  # OSError if it fails
        return tokenizer

    def pack(self, entry: _Input, number: int, tokenizer: Tokenizer) -> Summary:
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
                for batch in _batches(self._documents(entry, "tokenizing")):
                    encodings = tokenizer.encode_batch_fast(batch, add_special_tokens=False)
                    for text, encoding in zip(batch, encodings, strict=True):
                        for part, writer in zip(split(text, encoding.ids), (train, val), strict=True):
                            if part:
                                writer.append([*part, eos])
                        count += 1
                        size += len(text.encode())
                        words += len(text.split())
                        tokens += len(encoding)
            if VALIDATION / 3 * train.length < val.length < VALIDATION * 3 * train.length:
                break
        return {"documents": count, "bytes": size, "words": words, "tokens_per_word": tokens / words}

    def _documents(self, entry: _Input, label: str) -> Iterator[str]:
        with progress_bar(total_size(entry.files), label, self.progress) as bar:
            for text in documents(entry.data, self.text_column):
                yield text
                bar.update(len(text.encode()))


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    yield batch


def _fraction(text: str) -> float:
    """Return a hash of the text in [0, 1): equal documents are in the same split, in any order."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest()) / 2**56


def _by_document(text: str, ids: list[int]) -> tuple[list[int], list[int]]:
    return ([], ids) if _fraction(text) < VALIDATION else (ids, [])


def _by_tail(_text: str, ids: list[int]) -> tuple[list[int], list[int]]:
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


def _summarise(folder: Path, inputs: list[_Input], summaries: list[Summary]) -> None:
    """Compute the n-gram baselines on a sample with the sources in their proportions, and write summary.json."""
    train_samples, val_samples = [], []
    for number, (entry, counts) in enumerate(zip(inputs, summaries, strict=True)):
        if min(counts["train_tokens"], counts["val_tokens"]) < 3:
            tokens = f"{counts['train_tokens']} + {counts['val_tokens']} tokens"
            raise UserError(f"{entry.data}: {tokens} are too few to train on; give more text")
        source = entry.source(folder, number)
        train_samples.append(_sample(source.train, int(entry.weight * BASELINE_TOKENS)))
        val_samples.append(_sample(source.val, int(entry.weight * BASELINE_TOKENS / 10)))
    train, val = np.concatenate(train_samples), np.concatenate(val_samples)
    summary = _total(summaries) | {"unigram": unigram_loss(train, val), "trigram": trigram_loss(train, val)}
    if len(inputs) > 1:
        summary["sources"] = summaries
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")


def _total(summaries: list[Summary]) -> Summary:
    """Return the sums of the counts, None if a source has none, and tokens_per_word over all words."""
    columns = {name: [counts[name] for counts in summaries] for name in summaries[0]}
    total = {name: None if None in values else sum(values) for name, values in columns.items()}
    if total["words"] is not None:
        total["tokens_per_word"] = sum(np.multiply(columns["words"], columns["tokens_per_word"])) / total["words"]
    return total


def _sample(tokens: PackedTokens, limit: int, pieces: int = 16) -> np.ndarray:
    """Return all tokens, or `limit` of them in evenly spread pieces."""
    if len(tokens) <= limit:
        return tokens.read(0, len(tokens))
    starts = [piece * len(tokens) // pieces for piece in range(pieces)]
    return np.concatenate([tokens.read(start, start + limit // pieces) for start in starts])
