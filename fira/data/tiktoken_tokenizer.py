"""Tokenizers of tiktoken as tokenizers of the tokenizers library, which encode text to the same ids.

    "o200k_base"             →  tiktoken's ranks, pattern and special tokens  →  tokenizer.json in the cache
    ranks/o200k_base.tiktoken   the same, with ranks that were downloaded before, for a machine without network

tiktoken compares the ranks with their SHA-256. It merges the two neighbours whose concatenation has the lowest rank, so
every division of a token into two tokens is a merge of the converted tokenizer.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from fira.data.cache import cache_folder, cached
from fira.data.tokenizer import TOKENIZER
from fira.errors import UserError
from fira.files import errors_naming, one_line

NAMES = ("o200k_base", "r50k_base")  # tiktoken's gpt2 has the ids of r50k_base
SUFFIX = ".tiktoken"
URL = "https://openaipublic.blob.core.windows.net/encodings/"  # from which tiktoken downloads NAME.tiktoken
CACHE_VARIABLE = "TIKTOKEN_CACHE_DIR"
FORMAT = 1  # part of the cache key; increment it when the same ranks yield another tokenizer


def is_tiktoken(given: str) -> bool:
    """Return whether `--tokenizer` names a tokenizer of tiktoken, or a file of its ranks."""
    return given in NAMES or given.endswith(SUFFIX)


def tiktoken_file(given: str) -> Path:
    """Return the path of the tokenizer.json for one of NAMES, or for a file of ranks, which is converted once.

    Raises UserError for another name, without the package tiktoken, or if the ranks cannot be downloaded.
    """
    name = given if given in NAMES else Path(given).stem
    if name not in NAMES:
        raise UserError(f"--tokenizer {given}: unknown tokenizer; the name of the file is one of {', '.join(NAMES)}")

    def write(folder: Path) -> None:
        tokenizer = converted(_encoding(name, None if given in NAMES else Path(given)))
        tokenizer.save(str(folder / TOKENIZER))

    if given not in NAMES and not Path(given).is_file():
        raise UserError(f"--tokenizer {given}: no such file")
    key = hashlib.sha256(json.dumps(["tiktoken", FORMAT, name]).encode()).hexdigest()
    return cached(cache_folder(), key, False, write) / TOKENIZER


def converted(encoding: Any) -> Tokenizer:
    """Convert a tiktoken.Encoding."""
    ranks: dict[bytes, int] = encoding._mergeable_ranks  # transformers reads these attributes as well
    special: dict[str, int] = encoding._special_tokens
    characters = _characters()
    names = {token: "".join(characters[byte] for byte in token) for token in ranks}
    vocabulary = {names[token]: rank for token, rank in ranks.items()}
    merges = [
        (names[left], names[right])
        for token in sorted(ranks, key=ranks.__getitem__)
        for left, right in _divisions(token, ranks)
    ]
    tokenizer = Tokenizer(models.BPE(vocabulary | special, merges, ignore_merges=True))
    words = pre_tokenizers.Split(Regex(encoding._pat_str), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in special])
    return tokenizer


def _divisions(token: bytes, ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The divisions of a token into two tokens, by rank of the first and then of the second part."""
    parts = [(token[:place], token[place:]) for place in range(1, len(token))]
    found = [(left, right) for left, right in parts if left in ranks and right in ranks]
    return sorted(found, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))


def _characters() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary, as in GPT-2."""
    others = iter(range(256, 512))
    return [chr(byte) if chr(byte).isprintable() and chr(byte) != " " else chr(next(others)) for byte in range(256)]


def _encoding(name: str, ranks: Path | None) -> Any:
    """The tiktoken.Encoding of a name, with the ranks of a file, or those that tiktoken has cached or downloads."""
    try:
        import tiktoken
    except ImportError:
        raise UserError(f"--tokenizer {name} needs the package tiktoken; pip install -e '.[tiktoken]'") from None
    with _as_cache(name, ranks):
        try:
            return tiktoken.get_encoding(name)
        except (OSError, ValueError) as error:  # no network, or another SHA-256
            if ranks:
                raise UserError(f"--tokenizer {ranks}: not the ranks of {name}; copy {URL}{name}{SUFFIX}") from None
            remedy = f"give a file {name}{SUFFIX} with the ranks as --tokenizer"
            raise UserError(f"--tokenizer {name}: no ranks ({one_line(error)}); {remedy}") from None


@contextmanager
def _as_cache(name: str, ranks: Path | None) -> Iterator[None]:
    """Context manager in which a file of ranks, if there is one, is in the cache of tiktoken."""
    if ranks is None:
        yield
        return
    before = os.environ.get(CACHE_VARIABLE)
    with TemporaryDirectory() as folder:
        with errors_naming(ranks):
            shutil.copyfile(ranks, Path(folder, hashlib.sha1(f"{URL}{name}{SUFFIX}".encode()).hexdigest()))
        os.environ[CACHE_VARIABLE] = folder
        try:
            yield
        finally:
            del os.environ[CACHE_VARIABLE]
            if before is not None:
                os.environ[CACHE_VARIABLE] = before
