"""Training and validation shards: files of token ids that are read in place.

x_train_1.npy, x_val_1.npy     the names say which tokens are for training; also .bin
x.bin, x.idx; x.ds             with an index of documents: the last documents of each file are for validation
"""

import re
from dataclasses import dataclass
from pathlib import Path

from fira.data.document_index import index_of, open_index
from fira.data.packed import TokenSpan
from fira.data.sources import check_regular
from fira.data.token_files import SUFFIXES, map_tokens
from fira.errors import UserError
from fira.files import errors_naming

VALIDATION = 0.05  # fraction of the documents, or of their tokens


@dataclass(frozen=True)
class Shards:
    """Where the tokens for training and for validation are."""

    train: list[TokenSpan]
    val: list[TokenSpan]

    @property
    def tokens(self) -> list[Path]:
        """The files of tokens."""
        return [*dict.fromkeys(span.path for span in self.train + self.val)]

    @property
    def files(self) -> list[Path]:
        """The files of tokens, and then their indices."""
        return self.tokens + [index for path in self.tokens if (index := index_of(path))]


def find_shards(data: str | None) -> Shards | None:
    """Return the shards in the folder `data`, or in a file with an index of documents; None if there are none.

    As in Megatron-LM, `data` can also be the path of such a file without its suffix. Raises UserError if there are
    shards of one kind only, or if `data` is a single shard without an index.
    """
    if data is None:
        return None
    with errors_naming(Path(data)):  # the name may be too long
        return _find_shards(Path(data))


def _find_shards(path: Path) -> Shards | None:
    if file := _indexed_file(path):
        return _divided([file])
    if path.suffix.lower() in SUFFIXES and path.is_file():
        raise UserError(f"{path}: a single shard; give the folder that contains *_train_* and *_val_*")
    paths = [file for file in sorted(path.glob("*")) if file.suffix.lower() in SUFFIXES]
    train, val = ([file for file in paths if re.search(f"(^|_){part}[_.]", file.name)] for part in ("train", "val"))
    if not train and not val:
        return _divided([file for file in paths if index_of(file)])
    if not train or not val:
        missing = "val" if train else "train"
        raise UserError(f"{path}: no *_{missing}_* in this folder; training needs both kinds of shard")
    for file in train + val:
        check_regular(file)
    return Shards([TokenSpan(file) for file in train], [TokenSpan(file) for file in val])


def _indexed_file(path: Path) -> Path | None:
    """Return the tokens of a file with an index, given by its path, that of the index, or that without a suffix."""
    names = [path.name, path.name + ".bin", path.name + ".ds", path.stem + ".bin", path.stem]
    files = (path.parent / name for name in names)
    return next((file for file in files if file.is_file() and index_of(file)), None)


def _divided(files: list[Path]) -> Shards | None:
    """Return the last documents of each file for validation, about VALIDATION of its tokens, and the others."""
    train, val = [], []
    for path in files:
        check_regular(path)
        index, count = index_of(path), len(map_tokens(path))
        assert index
        cut = round(count * (1 - VALIDATION))
        document = open_index(path, index).next_document(cut)
        if VALIDATION / 3 * document < count - document < 3 * VALIDATION * document:
            cut = document
        train.append(TokenSpan(path, 0, cut))
        val.append(TokenSpan(path, cut, count))
    return Shards(train, val) if files else None
