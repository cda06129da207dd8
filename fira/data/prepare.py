"""From text to tokens, once: tokenizer, split, packing, baselines; the result is kept under its content's hash."""

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from tokenizers import Tokenizer

from fira.data.cache import cache_folder, content_key, publish, total_size
from fira.data.mixture import parse_mixture
from fira.data.ngram import trigram_loss, unigram_loss
from fira.data.packed import PackedTokens, TokenWriter, find_shards
from fira.data.sources import documents, input_files
from fira.data.tokenizer import eos_id, load_tokenizer, train_tokenizer, vocabulary
from fira.errors import UserError
from fira.progress_bar import progress_bar

FORMAT = 2  # part of every key: raise it when the same input would give another result
VALIDATION = 0.05  # share of the documents
TOKENIZER_BYTES = 64e6  # merges learnt from more text hardly differ
BATCH = 2**20  # characters tokenized together
BASELINE_TOKENS = 10_000_000  # counted for the n-gram baselines; of validation tokens a tenth

Summary = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """One source's tokens, and its share of the training sequences."""

    weight: float
    train: PackedTokens
    val: PackedTokens


@dataclass(frozen=True)
class Corpus:
    """Tokens ready to train on.

    `tokenizer`: a tokenizer.json beside them; None for shards given without one. `summary`: documents and bytes (None
    for shards), train_tokens, val_tokens, tokens_per_word (its fertility), unigram and trigram (loss on the validation
    tokens, nats per token); of several sources, `sources` tells the same of each.
    """

    sources: list[Source]
    tokenizer: Path | None
    vocab_size: int
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
    """The corpus of `data` (see `mixture.parse_mixture`, `sources.documents`, `packed.find_shards`), from the cache
    when it was made before.

    The key is the SHA-256 of the inputs' content, the tokenizer and the settings. Several processes may prepare the
    same corpus: each works aside and the first to finish publishes. `vocab_size` may exceed the tokenizer's, not fall
    below it. UserError for whatever of this cannot be used.
    """
    cache = Path(cache_dir or cache_folder())
    try:
        given = load_tokenizer(tokenizer_path) if tokenizer_path else None
        if given and vocabulary(given) > vocab_size:
            raise UserError(
                f"{tokenizer_path}: {vocabulary(given)} tokens, --vocab-size {vocab_size}; give at least as many"
            )
        inputs = [_Input.find(source, weight) for source, weight in parse_mixture(data)]
        files = [path for each in inputs for path in each.files]
        layout = [[each.weight, text_column, len(each.files), each.shards] for each in inputs]
        settings = [FORMAT, vocab_size, bool(tokenizer_path), layout]
        tokenizer_files = [Path(tokenizer_path)] if tokenizer_path else []
        folder = cache / content_key(cache, files + tokenizer_files, settings, progress)
        if not folder.is_dir():
            with publish(folder) as aside:
                if tokenizer_path:
                    shutil.copy(tokenizer_path, aside / "tokenizer.json")
                _Work(aside, inputs, text_column, vocab_size, progress).run(given)
        tokenizer = folder / "tokenizer.json"
        summary = json.loads((folder / "summary.json").read_text())
        for each, counts in zip(inputs, summary.get("sources", ()), strict=False):
            counts |= {"data": each.data, "weight": each.weight}  # not kept: the same text may have another name now
        return Corpus(
            sources=[each.source(folder, number) for number, each in enumerate(inputs)],
            tokenizer=tokenizer if tokenizer.exists() else None,
            vocab_size=vocab_size,
            summary=summary,
            folder=folder,
        )
    except OSError as error:
        raise UserError(f"{error.filename or cache}: {error.strerror or error}; mend that, or the cache") from error


@dataclass(frozen=True)
class _Input:
    """A source as it was given. shards: how many of its files are training shards; None where they are text."""

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
        """Its tokens: shards stay where they lie, of text they are in `folder`."""
        train, val = self.files[: self.shards], self.files[self.shards :]
        if self.shards is None:
            train, val = ([folder / f"{split}-{number}.npy"] for split in ("train", "val"))
        return Source(self.weight, PackedTokens(train), PackedTokens(val))


@dataclass(frozen=True)
class _Work:
    """Sources on their way to tokens."""

    folder: Path
    inputs: list[_Input]
    text_column: str
    vocab_size: int
    progress: bool

    def run(self, tokenizer: Tokenizer | None) -> None:
        """Fill the folder: tokenizer.json if none is given, tokens, summary.json."""
        texts = [each for each in self.inputs if each.shards is None]
        if texts and not tokenizer:
            if len(texts) < len(self.inputs):
                raise UserError("--data mixes text with shards of tokens; give the shards' own --tokenizer")
            tokenizer = self.train_tokenizer()
        told = []
        for number, each in enumerate(self.inputs):
            if each.shards is None:
                assert tokenizer
                counts = self.pack(each, number, tokenizer)
            else:
                counts = dict.fromkeys(("documents", "bytes", "words", "tokens_per_word"))
                _check_ids(each.files, self.vocab_size, self.progress)
            source = each.source(self.folder, number)
            told.append({**counts, "train_tokens": len(source.train), "val_tokens": len(source.val)})
        _summarise(self.folder, self.inputs, told)

    def train_tokenizer(self) -> Tokenizer:
        """Train on the text, or on an even sample of it when it is large, and save as tokenizer.json.

        Of several sources a small one is repeated until it counts for its share, as it will in training.
        """
        sizes = [max(total_size(each.files), 1) for each in self.inputs]
        whole = max(size / each.weight for size, each in zip(sizes, self.inputs, strict=True))
        shares = [
            each.weight * min(whole, TOKENIZER_BYTES) / size for size, each in zip(sizes, self.inputs, strict=True)
        ]

        def sample() -> Iterator[str]:
            for each, share in zip(self.inputs, shares, strict=True):
                for number, text in enumerate(self._documents(each, "reading for the tokenizer")):
                    if number == 0 or _fraction(text) > 1 - share:  # never nothing
                        yield from [text] * max(1, round(share))

        tokenizer = train_tokenizer(sample(), self.vocab_size)
        tokenizer.save(str(self.folder / "tokenizer.json"))
        return tokenizer

    def pack(self, each: _Input, number: int, tokenizer: Tokenizer) -> Summary:
        """Write train and val tokens, each document ended by EOS and whole in one of them, where that works out."""
        eos = eos_id(tokenizer)
        for split in (_by_document, _by_tail):
            count = size = words = tokens = 0
            with (
                TokenWriter(self.folder / f"train-{number}.npy", self.vocab_size) as train,
                TokenWriter(self.folder / f"val-{number}.npy", self.vocab_size) as val,
            ):
                for batch in _batches(self._documents(each, "tokenizing")):
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

    def _documents(self, each: _Input, label: str) -> Iterator[str]:
        with progress_bar(total_size(each.files), label, self.progress) as bar:
            for text in documents(each.data, self.text_column):
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
    """A number in [0, 1) that depends on the text alone: the same document is always on the same side of a split."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest()) / 2**56


def _by_document(text: str, ids: list[int]) -> tuple[list[int], list[int]]:
    return ([], ids) if _fraction(text) < VALIDATION else (ids, [])


def _by_tail(_text: str, ids: list[int]) -> tuple[list[int], list[int]]:
    """For few (or many equal) documents, where chance leaves one side without: the end of each is for validation."""
    cut = len(ids) - max(1, round(len(ids) * VALIDATION))
    return ids[:cut], ids[cut:]


def _check_ids(shards: list[Path], vocab_size: int, progress: bool) -> None:
    with progress_bar(total_size(shards), "checking the shards", progress) as bar:
        for path in shards:
            for ids in PackedTokens([path]).chunks():
                if len(ids) and not 0 <= ids.min() <= ids.max() < vocab_size:
                    wrong = ids.max() if ids.max() >= vocab_size else ids.min()
                    raise UserError(
                        f"{path}: token id {wrong}, --vocab-size {vocab_size}; give a larger vocabulary size"
                    )
            bar.update(path.stat().st_size)


def _summarise(folder: Path, inputs: list[_Input], told: list[Summary]) -> None:
    """Count the n-gram baselines, on sources in their proportions, and write summary.json."""
    seen, unseen = [], []
    for number, (each, counts) in enumerate(zip(inputs, told, strict=True)):
        if min(counts["train_tokens"], counts["val_tokens"]) < 3:
            tokens = f"{counts['train_tokens']} + {counts['val_tokens']} tokens"
            raise UserError(f"{each.data}: {tokens} are too few to train on; give more")
        source = each.source(folder, number)
        seen.append(_sample(source.train, int(each.weight * BASELINE_TOKENS)))
        unseen.append(_sample(source.val, int(each.weight * BASELINE_TOKENS / 10)))
    train, val = np.concatenate(seen), np.concatenate(unseen)
    summary = _total(told) | {"unigram": unigram_loss(train, val), "trigram": trigram_loss(train, val)}
    if len(inputs) > 1:
        summary["sources"] = told
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")


def _total(told: list[Summary]) -> Summary:
    """The sums of the sources' counts, None where one has none, and the mean of their fertilities over all words."""
    known = {name: [counts[name] for counts in told] for name in told[0]}
    total = {name: None if None in values else sum(values) for name, values in known.items()}
    if total["words"] is not None:
        total["tokens_per_word"] = sum(np.multiply(known["words"], known["tokens_per_word"])) / total["words"]
    return total


def _sample(tokens: PackedTokens, limit: int, pieces: int = 16) -> np.ndarray:
    """All tokens, or `limit` of them in evenly spread pieces."""
    if len(tokens) <= limit:
        return tokens.read(0, len(tokens))
    starts = [piece * len(tokens) // pieces for piece in range(pieces)]
    return np.concatenate([tokens.read(start, start + limit // pieces) for start in starts])
