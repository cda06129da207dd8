"""Tokenize documents of any length on all cores, in bounded memory.

texts  →  pieces of at most PIECE characters  →  batches of about BATCH characters  →  the ids of each text

A tokenizer needs about 200 bytes per character. It divides a batch over the cores, but the conversion of its result and
the work of the caller use one core. Therefore IN_PARALLEL batches are tokenized at the same time.
"""

from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from tokenizers import Tokenizer

from fira.data.tokenizer import library_errors

PIECE = 2**17  # characters; more than a document of a text file has
BATCH = 2**19  # characters tokenized together
IN_PARALLEL = 2  # batches

Batch = list[tuple[str, str | None]]  # pieces, each with its text if it is the last one of this text
T = TypeVar("T")


def split_long(text: str) -> Iterator[str]:
    """Yield pieces of at most PIECE characters.

    A piece ends before white space, where words begin in a tokenizer of `train_tokenizer`, so that it has the same
    tokens as in the whole text. Only text without white space is split inside a word.
    """
    start = 0
    while len(text) - start > PIECE:
        end = _end_of_word(text, start + PIECE // 2, start + PIECE)
        yield text[start:end]
        start = end
    yield text[start:]


def _end_of_word(text: str, first: int, last: int) -> int:
    for end in range(last, first, -1):
        if text[end] in " \n" and not text[end - 1].isspace():
            return end
    return last


def encode_documents(tokenizer: Tokenizer, texts: Iterable[str]) -> Iterator[tuple[str, "array[int]"]]:
    """Yield each text with its ids, of type uint32. Raises UserError if the tokenizer fails."""

    def encode(batch: Batch) -> "list[array[int]]":
        with library_errors("the tokenizer cannot encode the text; give another --tokenizer"):
            encodings = tokenizer.encode_batch_fast([piece for piece, _ in batch], add_special_tokens=False)
        return [array("I", encoding.ids) for encoding in encodings]  # a list would need nine times the memory

    ids = array("I")
    for batch, encoded in _in_parallel(encode, _batches(texts)):
        for (_, text), part in zip(batch, encoded, strict=True):
            ids.extend(part)
            if text is not None:
                yield text, ids
                ids = array("I")


def _in_parallel(function: Callable[[Batch], T], batches: Iterable[Batch]) -> Iterator[tuple[Batch, T]]:
    """Yield each batch with the result of the function, in order. Batches are read ahead of the results."""
    waiting: deque[tuple[Batch, Future[T]]] = deque()
    with ThreadPoolExecutor(IN_PARALLEL) as pool:
        for batch in batches:
            waiting.append((batch, pool.submit(function, batch)))
            if len(waiting) > IN_PARALLEL:
                done, result = waiting.popleft()
                yield done, result.result()
        for done, result in waiting:
            yield done, result.result()


def _batches(texts: Iterable[str]) -> Iterator[Batch]:
    """Yield batches of pieces, each with its text if it is the last piece of this text, else with None."""
    batch: Batch = []
    size = 0
    for text in texts:
        end = 0
        for piece in split_long(text):
            end += len(piece)
            batch.append((piece, text if end == len(text) else None))
            size += len(piece)
            if size >= BATCH:
                yield batch
                batch, size = [], 0
    yield batch
