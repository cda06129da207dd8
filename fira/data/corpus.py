"""Corpora of tokens, prepared once and cached by the hash of their content."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from fira.data.cache import cache_folder, cached, content_key
from fira.data.mixture import parse_mixture
from fira.data.packed import Source
from fira.data.preparation import Input, Preparation
from fira.data.summary import Summary
from fira.data.tokenizer import TOKENIZER, load_tokenizer, vocabulary
from fira.errors import UserError

CORPUS_FORMAT = 3  # part of the cache key; increment it when the same input yields another result
MAX_VOCABULARY = 2**21 - 1  # a trigram of ids fits in 63 bits


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
    verified: Path | None = None,
) -> Corpus:
    """Return the corpus of `data`, from the cache where it has been prepared before.

    For the syntax of `data` see `mixture.parse_mixture`, `sources.documents` and `packed.find_shards`. The cache key is
    the SHA-256 of the inputs' content, the tokenizer and the settings. Several processes may prepare the same corpus at
    the same time: each writes to a temporary folder, and the first to finish renames it. `vocab_size` must be at least
    that of the tokenizer. verified: the folder of this corpus, which another process has prepared or compared with its
    checksums; it is opened without reading the input. Raises UserError for invalid input.
    """
    cache = Path(cache_dir or cache_folder())
    if vocab_size > MAX_VOCABULARY:
        raise UserError(f"--vocab-size {vocab_size}: give at most {MAX_VOCABULARY}")
    try:
        given = _load_tokenizer(tokenizer_path, vocab_size) if tokenizer_path else None
        inputs = [Input.find(source, weight) for source, weight in parse_mixture(data)]
        folder = verified or _prepared(cache, inputs, text_column, given, tokenizer_path, vocab_size, progress)
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


def _prepared(
    cache: Path,
    inputs: list[Input],
    text_column: str,
    tokenizer: Tokenizer | None,
    tokenizer_path: str | Path | None,
    vocab_size: int,
    progress: bool,
) -> Path:
    """The folder of the cache with the corpus, which is prepared if it is missing or damaged."""
    files = [path for entry in inputs for path in entry.files]
    layout = [
        [entry.weight, text_column, len(entry.files), len(entry.shards.train) if entry.shards else None]
        for entry in inputs
    ]
    settings = [CORPUS_FORMAT, vocab_size, bool(tokenizer_path), layout]
    tokenizer_files = [Path(tokenizer_path)] if tokenizer_path else []

    def write(folder: Path) -> None:
        if tokenizer_path:
            shutil.copy(tokenizer_path, folder / TOKENIZER)
        Preparation(folder, inputs, text_column, vocab_size, progress).run(tokenizer, tokenizer_path)

    return cached(cache, content_key(cache, files + tokenizer_files, settings, progress), progress, write)


def _load_tokenizer(path: str | Path, vocab_size: int) -> Tokenizer:
    """Load a tokenizer. Raises UserError if it has more tokens than the vocabulary."""
    tokenizer = load_tokenizer(path)
    if vocabulary(tokenizer) > vocab_size:
        raise UserError(f"{path}: {vocabulary(tokenizer)} tokens, --vocab-size {vocab_size}; give at least this number")
    return tokenizer
