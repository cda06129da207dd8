"""From text to tokens, once: tokenizer, split, packing, baselines; the result is kept under its content's hash."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from fira.data.cache import content_key, publish, total_size
from fira.data.ngram import trigram_loss, unigram_loss
from fira.data.packed import PackedTokens, TokenWriter, find_shards
from fira.data.progress import progress_bar
from fira.data.sources import documents, input_files
from fira.data.tokenizer import eos_id, load_tokenizer, train_tokenizer, vocabulary
from fira.errors import UserError

FORMAT = 1  # part of every key: raise it when the same input would give another result
VALIDATION = 0.05  # share of the documents
TOKENIZER_BYTES = 64e6  # merges learnt from more text hardly differ
BATCH = 2**20  # characters tokenized together
BASELINE_TOKENS = 10_000_000  # counted for the n-gram baselines; of validation tokens a tenth

Summary = dict[str, int | float | None]


@dataclass(frozen=True)
class Corpus:
    """Tokens ready to train on.

    `tokenizer`: a tokenizer.json beside them; None for shards given without one. `summary`: documents and bytes (None
    for shards), train_tokens, val_tokens, unigram and trigram (loss on the validation tokens, nats per token).
    """

    train: PackedTokens
    val: PackedTokens
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
    """The corpus of `data` (see `sources.documents`, `packed.find_shards`), from the cache when it was made before.

    The key is the SHA-256 of the inputs' content, the tokenizer and the settings. Several processes may prepare the
    same corpus: each works aside and the first to finish publishes. `vocab_size` may exceed the tokenizer's, not fall
    below it. UserError for whatever of this cannot be used.
    """
    cache = Path(cache_dir or os.environ.get("FIRA_CACHE") or Path.home() / ".cache" / "fira")
    try:
        given = load_tokenizer(tokenizer_path) if tokenizer_path else None
        if given and vocabulary(given) > vocab_size:
            raise UserError(
                f"{tokenizer_path}: {vocabulary(given)} tokens, --vocab-size {vocab_size}; give at least as many"
            )
        shards = find_shards(data)
        files = shards[0] + shards[1] if shards else input_files(data)
        inputs = [*files, Path(tokenizer_path)] if tokenizer_path else files
        layout = [len(part) for part in shards] if shards else text_column
        folder = cache / content_key(cache, inputs, [FORMAT, vocab_size, bool(tokenizer_path), layout], progress)
        if not folder.is_dir():
            with publish(folder) as aside:
                if given and tokenizer_path:
                    shutil.copy(tokenizer_path, aside / "tokenizer.json")
                if shards:
                    _check_ids(files, vocab_size, progress)
                    _measure(aside, data, *shards, {"documents": None, "bytes": None})
                else:
                    work = _Work(aside, data, text_column, vocab_size, files, progress)
                    counts = work.pack(given or work.train_tokenizer())
                    _measure(aside, data, [aside / "train.npy"], [aside / "val.npy"], counts)
        train, val = shards or ([folder / "train.npy"], [folder / "val.npy"])
        tokenizer = folder / "tokenizer.json"
        return Corpus(
            train=PackedTokens(train),
            val=PackedTokens(val),
            tokenizer=tokenizer if tokenizer.exists() else None,
            vocab_size=vocab_size,
            summary=json.loads((folder / "summary.json").read_text()),
            folder=folder,
        )
    except OSError as error:
        raise UserError(f"{error.filename or cache}: {error.strerror or error}; mend that, or the cache") from error


@dataclass(frozen=True)
class _Work:
    """One text source on its way to tokens."""

    folder: Path
    data: str | None
    text_column: str
    vocab_size: int
    files: list[Path]
    progress: bool

    def train_tokenizer(self) -> Tokenizer:
        """Train on the text, or on an even sample of it when it is large, and save as tokenizer.json."""
        share = TOKENIZER_BYTES / max(total_size(self.files), 1)
        texts = enumerate(self._documents("reading for the tokenizer"))
        sample = (text for number, text in texts if number == 0 or _fraction(text) > 1 - share)  # never nothing
        tokenizer = train_tokenizer(sample, self.vocab_size)
        tokenizer.save(str(self.folder / "tokenizer.json"))
        return tokenizer

    def pack(self, tokenizer: Tokenizer) -> Summary:
        """Write train.npy and val.npy, each document ended by EOS and whole in one of them, where that works out."""
        eos = eos_id(tokenizer)
        for split in (_by_document, _by_tail):
            count = size = 0
            with (
                TokenWriter(self.folder / "train.npy", self.vocab_size) as train,
                TokenWriter(self.folder / "val.npy", self.vocab_size) as val,
            ):
                for batch in _batches(self._documents("tokenizing")):
                    encodings = tokenizer.encode_batch_fast(batch, add_special_tokens=False)
                    for text, encoding in zip(batch, encodings, strict=True):
                        for part, writer in zip(split(text, encoding.ids), (train, val), strict=True):
                            if part:
                                writer.append([*part, eos])
                        count += 1
                        size += len(text.encode())
            if VALIDATION / 3 * train.length < val.length < VALIDATION * 3 * train.length:
                break
        return {"documents": count, "bytes": size}

    def _documents(self, label: str) -> Iterator[str]:
        with progress_bar(total_size(self.files), label, self.progress) as bar:
            for text in documents(self.data, self.text_column):
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


def _measure(folder: Path, data: str | None, train: list[Path], val: list[Path], counts: Summary) -> None:
    """Count the n-gram baselines and write summary.json."""
    train_tokens, val_tokens = PackedTokens(train), PackedTokens(val)
    if min(len(train_tokens), len(val_tokens)) < 3:
        raise UserError(f"{data}: {len(train_tokens)} + {len(val_tokens)} tokens are too few to train on; give more")
    summary: Summary = {**counts, "train_tokens": len(train_tokens), "val_tokens": len(val_tokens)}
    seen, unseen = _sample(train_tokens, BASELINE_TOKENS), _sample(val_tokens, BASELINE_TOKENS // 10)
    summary |= {"unigram": unigram_loss(seen, unseen), "trigram": trigram_loss(seen, unseen)}
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")


def _sample(tokens: PackedTokens, limit: int, pieces: int = 16) -> np.ndarray:
    """All tokens, or `limit` of them in evenly spread pieces."""
    if len(tokens) <= limit:
        return tokens.read(0, len(tokens))
    starts = [piece * len(tokens) // pieces for piece in range(pieces)]
    return np.concatenate([tokens.read(start, start + limit // pieces) for start in starts])
