"""Tokenize the texts of sources, and write the tokens for training and for validation.

    train-0.npy, val-0.npy    the tokens of source 0, with EOS after each document
    progress.json             up to which document the files of each source are complete

A process that is killed leaves these files, from which the next one continues.
"""

import hashlib
import json
import logging
import time
from array import array
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields
from itertools import islice
from pathlib import Path

from tokenizers import Tokenizer

from fira import files
from fira.data.packed import TokenWriter
from fira.data.pieces import encode_documents
from fira.data.summary import Summary
from fira.data.text_stream import TextStream
from fira.data.token_shards import VALIDATION
from fira.data.tokenizer import eos_id
from fira.errors import UserError
from fira.json_reader import array as array_of
from fira.json_reader import integer, read, record, scalar, text

PROGRESS = "progress.json"
SAVED_EVERY_S = 10.0  # seconds

Open = Callable[[int, int], AbstractContextManager[TextStream]]  # the documents from a file on, see SourceProgress

log = logging.getLogger(__name__)


@dataclass
class SourceProgress:
    """What has been written of a source. split: name in SPLITS.

    documents, bytes, words: of the text. tokens: without EOS. train, val: tokens written. The next document is in
    `file`, before which there are `before` documents.
    """

    split: str = "document"
    complete: bool = False
    file: int = 0
    before: int = 0
    documents: int = 0
    bytes: int = 0
    words: int = 0
    tokens: int = 0
    train: int = 0
    val: int = 0

    def summary(self) -> Summary:
        counts = {"documents": self.documents, "bytes": self.bytes, "words": self.words}
        return counts | {"tokens_per_word": self.tokens / self.words}


FIELDS = [field.name for field in fields(SourceProgress)]
PROGRESS_SCHEMA = array_of(
    record(dict.fromkeys(FIELDS, integer()) | {"complete": scalar, "split": text("document|tail", "document or tail")})
)


class TextPacker:
    """Writes the tokens of the sources of a corpus to a folder.

    Documents are assigned to a split as a whole, or divided where this does not give VALIDATION approximately.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._folder, self._tokenizer, self._vocab_size = folder, tokenizer, vocab_size
        self._eos = eos_id(tokenizer)
        self._sources = _read_progress(folder / PROGRESS)

    def pack(self, number: int, open_stream: Open) -> Summary:
        """Write the tokens of source `number`, and return the counts."""
        while len(self._sources) <= number:
            self._sources.append(SourceProgress())
        state = self._sources[number]
        if state.documents and not state.complete:
            log.info(f"tokenizing continues after {state.documents:,} documents")
        while not state.complete:
            self._write(number, state, open_stream)
            if state.split == "tail" or VALIDATION / 3 * state.train < state.val < VALIDATION * 3 * state.train:
                state.complete = True
            else:
                state = self._sources[number] = SourceProgress("tail")
            self._save()
        return state.summary()

    def _write(self, number: int, state: SourceProgress, open_stream: Open) -> None:
        divide, saved = SPLITS[state.split], time.monotonic()
        with (
            TokenWriter(self._folder / f"train-{number}.npy", self._vocab_size, state.train) as train,
            TokenWriter(self._folder / f"val-{number}.npy", self._vocab_size, state.val) as val,
            open_stream(state.file, state.before) as stream,
        ):
            documents = islice(stream, state.documents - state.before, None)
            for document, ids in encode_documents(self._tokenizer, documents):
                raw = document.encode()
                state.documents += 1
                state.bytes += len(raw)
                state.words += len(document.split())
                state.tokens += len(ids)
                for part, writer in zip(divide(raw, ids), (train, val), strict=True):
                    if part:
                        part.append(self._eos)
                        writer.append(part)
                state.train, state.val = train.length, val.length
                if time.monotonic() - saved > SAVED_EVERY_S:
                    train.flush()
                    val.flush()
                    state.file, state.before = stream.place(state.documents)
                    self._save()
                    saved = time.monotonic()

    def _save(self) -> None:
        files.replace(self._folder / PROGRESS, json.dumps([*map(asdict, self._sources)]).encode())


def _read_progress(path: Path) -> list[SourceProgress]:
    """Return what a killed process has written of each source; nothing if there is no such file, or a damaged one."""
    try:
        stored = read(path, PROGRESS_SCHEMA)
    except UserError:
        return []
    return [SourceProgress(**{name: source[name] for name in FIELDS}) for source in stored]


def fraction(raw: bytes) -> float:
    """Return a hash of a text in [0, 1): equal documents are in the same split, in any order."""
    return int.from_bytes(hashlib.blake2b(raw, digest_size=7).digest()) / 2**56


def _by_document(raw: bytes, ids: "array[int]") -> tuple["array[int]", "array[int]"]:
    return (array("I"), ids) if fraction(raw) < VALIDATION else (ids, array("I"))


def _by_tail(_raw: bytes, ids: "array[int]") -> tuple["array[int]", "array[int]"]:
    """Use the end of each document for validation; for corpora of few or of many equal documents."""
    cut = len(ids) - max(1, round(len(ids) * VALIDATION))
    return ids[:cut], ids[cut:]


SPLITS = {"document": _by_document, "tail": _by_tail}
