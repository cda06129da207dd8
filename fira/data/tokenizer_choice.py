"""The tokenizer of a run: a file, a tokenizer of tiktoken by name, or the file next to shards of tokens."""

from pathlib import Path

from fira.data.mixture import parse_mixture
from fira.data.tiktoken_tokenizer import is_tiktoken, tiktoken_file
from fira.data.token_shards import find_shards
from fira.data.tokenizer import TOKENIZER


def choose_tokenizer(given: str | None, data: str | None = None) -> str | None:
    """Return the path of the tokenizer.json that `--tokenizer` names, or else of the one next to shards of `data`.

    None: there is neither. Raises UserError for a name of tiktoken that cannot be loaded.
    """
    if given is not None:
        return str(tiktoken_file(given)) if is_tiktoken(given) else given
    folders = [Path(source) for source, _ in parse_mixture(data) if source and find_shards(source)]
    return next((str(folder / TOKENIZER) for folder in folders if (folder / TOKENIZER).is_file()), None)
