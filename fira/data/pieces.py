"""Tokenize documents of any length in bounded memory, because a tokenizer needs about 200 bytes per character.

texts  →  pieces of at most PIECE characters  →  batches of about BATCH characters  →  the ids of each text
"""

from array import array
from collections.abc import Iterable, Iterator

from tokenizers import Tokenizer

from fira.data.tokenizer import library_errors

PIECE = 2**17  # characters; more than a document of a text file has
BATCH = 2**20  # characters tokenized together


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
    ids = array("I")  # a list would need nine times the memory
    for batch in _batches(texts):
        with library_errors("the tokenizer cannot encode the text; give another --tokenizer"):
            encodings = tokenizer.encode_batch_fast([piece for piece, _ in batch], add_special_tokens=False)
        for (_, text), encoding in zip(batch, encodings, strict=True):
            ids.extend(encoding.ids)
            if text is not None:
                yield text, ids
                ids = array("I")


def _batches(texts: Iterable[str]) -> Iterator[list[tuple[str, str | None]]]:
    """Yield batches of pieces, each with its text if it is the last piece of this text, else with None."""
    batch: list[tuple[str, str | None]] = []
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
