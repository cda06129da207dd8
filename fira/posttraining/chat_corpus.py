"""Chats and preferences as packed examples, prepared once and cached by the hash of their content.

data  →  records  →  chats  →  tokens, with a mask of the trained ones  →  validation split  →  packed sequences

An example is a chat, or with `pairs` the two chats with the chosen and the rejected answer to the same prompt.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import reduce
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from fira.data.cache import cache_folder, cached, content_key, total_size
from fira.data.chat_template import Chat, ChatTemplate
from fira.data.compression import Advance
from fira.data.mixture import parse_mixture
from fira.data.sources import input_files
from fira.data.token_shards import VALIDATION
from fira.data.tokenizer import TOKENIZER, load_tokenizer, vocabulary, with_role_tokens
from fira.data.tokenizer_config import CHAT_TEMPLATE, TOKENIZER_CONFIG, TokenizerConfig, read_config_beside
from fira.errors import UserError
from fira.posttraining.chat_records import read_chats, read_preferences
from fira.posttraining.packed_examples import Example, PackedExamples, tokens_of, write_examples
from fira.posttraining.preference_pairs import PreferencePairs
from fira.posttraining.prompted_answers import runs
from fira.progress_bar import progress_bar

CHAT_FORMAT = 3  # part of the cache key; increment it when the same input yields another result


@dataclass(frozen=True)
class ChatSource:
    """The packed examples of a source and its share of the training sequences."""

    weight: float
    train: PackedExamples | PreferencePairs
    val: PackedExamples | PreferencePairs


@dataclass(frozen=True)
class ChatInput:
    """A source of `data`. pairs: its records are preferences. answer_tokens: see `write_examples`."""

    data: str | None
    weight: float
    files: list[Path]
    pairs: bool
    answer_tokens: int

    def write(
        self, folder: Path, number: int, template: ChatTemplate, seq_len: int, progress: bool
    ) -> dict[str, int | float]:
        """Write the packed examples of both splits, and return their counts."""
        with progress_bar(total_size(self.files), "tokenizing", progress) as bar:
            examples = [*self._encoded(template, bar.update)]
        short = [shortened(example, seq_len) for example in examples]
        counts: dict[str, int | float] = {"shortened": sum(a is not b for a, b in zip(examples, short, strict=True))}
        for split, part in zip(("train", "val"), _split(short, str(self.data)), strict=True):
            written = write_examples(folder, f"{split}-{number}", part, seq_len, self.answer_tokens)
            counts |= {f"{split}_{name}": value for name, value in written.items()}
        return counts

    def _encoded(self, template: ChatTemplate, advance: Advance) -> Iterator[Example]:
        if not self.pairs:
            return zip(template.encode(read_chats(self.files, advance)))
        chats: Iterator[Chat] = chain.from_iterable(read_preferences(self.files, advance))
        encoded = template.encode(chats)
        return zip(encoded, encoded, strict=True)  # chosen and rejected in turn

    def source(self, folder: Path, number: int, seq_len: int) -> ChatSource:
        """Return the packed examples that `write` has written."""
        train, val = (PackedExamples(folder, f"{split}-{number}", seq_len) for split in ("train", "val"))
        return ChatSource(self.weight, train, val)


@dataclass(frozen=True)
class ChatCorpus:
    """Chats or preferences to train on.

    tokenizer: the path of the tokenizer.json. summary: for both splits, with the prefix train_ or val_, the counts of
    `write_examples` summed over sources; and shortened, the number of examples without their first turns.
    """

    sources: list[ChatSource]
    tokenizer: Path
    summary: dict[str, Any]
    folder: Path


def prepare_chats(
    data: str,
    tokenizer_path: str | Path,
    vocab_size: int,
    seq_len: int,
    cache_dir: str | Path | None = None,
    progress: bool = True,
    verified: Path | None = None,
    pairs: bool = False,
    answer_tokens: int = 0,
) -> ChatCorpus:
    """Return the chats of `data`, from the cache where they have been prepared before; see `corpus.prepare`.

    data: a table, a folder of tables, or several with weights, with records of `chat_records`. tokenizer_path: a
    tokenizer.json; the chat template is next to it. Tokens of the roles are added to a tokenizer without a template.
    pairs: the records are preferences. answer_tokens: see `write_examples`. An example longer than `seq_len` tokens is
    `shortened`. Raises UserError, which names file and row, if a record is not a chat or a preference, or if an answer
    does not fit into a sequence, and if the tokenizer has more than `vocab_size` tokens.
    """
    cache = Path(cache_dir or cache_folder())
    try:
        inputs = [
            ChatInput(source, weight, input_files(source), pairs, answer_tokens)
            for source, weight in parse_mixture(data)
        ]
        folder = verified or _prepared(cache, inputs, Path(tokenizer_path), vocab_size, seq_len, progress)
        return ChatCorpus(
            sources=[entry.source(folder, number, seq_len) for number, entry in enumerate(inputs)],
            tokenizer=folder / TOKENIZER,
            summary=json.loads((folder / "summary.json").read_text()),
            folder=folder,
        )
    except OSError as error:
        raise UserError(
            f"{error.filename or cache}: {error.strerror or error}; check the path, or set FIRA_CACHE to another folder"
        ) from error


def chat_tokenizer(path: Path) -> tuple[Tokenizer, TokenizerConfig]:
    """Return a tokenizer with its chat template, or where it has none, with the tokens of the roles and CHAT_TEMPLATE.

    path: of the tokenizer.json; the template is next to it.
    """
    tokenizer = load_tokenizer(path)
    config = read_config_beside(tokenizer, path)
    if config.chat_template is not None:
        return tokenizer, config
    return with_role_tokens(tokenizer), replace(config, chat_template=CHAT_TEMPLATE)


def _prepared(
    cache: Path, inputs: list[ChatInput], tokenizer_path: Path, vocab_size: int, seq_len: int, progress: bool
) -> Path:
    """The folder of the cache with the packed examples, which are prepared if it is missing or damaged."""
    tokenizer, config = chat_tokenizer(tokenizer_path)
    if vocabulary(tokenizer) > vocab_size:
        raise UserError(
            f"{tokenizer_path}: {vocabulary(tokenizer)} tokens with those of the chat template, the model has "
            f"{vocab_size}; give a model with a larger vocabulary"
        )
    template = ChatTemplate(tokenizer, config)

    def write(folder: Path) -> None:
        (folder / TOKENIZER).write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
        (folder / TOKENIZER_CONFIG).write_bytes(config.to_json())
        counts = [entry.write(folder, number, template, seq_len, progress) for number, entry in enumerate(inputs)]
        (folder / "summary.json").write_text(json.dumps(_summary(counts), indent=2) + "\n")

    files = [path for entry in inputs for path in entry.files]
    layout = [[entry.weight, len(entry.files), entry.pairs] for entry in inputs]
    # Not the content of tokenizer.json, because a resumed run reads the one in its checkpoint, with the new tokens.
    settings = ["chats", CHAT_FORMAT, VALIDATION, seq_len, tokenizer.to_str(), asdict(config), layout]
    settings += sorted({entry.answer_tokens for entry in inputs} - {0})  # absent from the keys of older versions
    return cached(cache, content_key(cache, files, settings, progress), progress, write)


def shortened(example: Example, limit: int) -> Example:
    """Return an example without its first turns if it has more than `limit` tokens, as `fira chat` drops them.

    The chats of a pair lose the same turns. If the last turn alone is longer, the question loses its beginning. Raises
    UserError if the last answer of a chat, or the answers of a pair, do not fit.
    """
    excess, most = tokens_of(example) - limit, _droppable(example)
    if excess <= 0:
        return example
    least = -(-excess // len(example))
    ends = reduce(np.intersect1d, [runs(chat.answers)[1] for chat in example])  # of turns that all its chats have
    after_turns = ends[(ends >= least) & (ends < most)]
    start = int(after_turns[0]) if len(after_turns) else least
    if start >= most:
        answers = " and ".join(str(len(chat.ids) - most) for chat in example)
        raise UserError(
            f"{example[0].where}: answer of {answers} tokens, for which sequences of {limit} have no room; "
            "shorten it, or give a larger --seq-len"
        )
    return tuple(
        replace(chat, **{name: getattr(chat, name)[start:] for name in ("ids", "answers", "trained")})
        for chat in example
    )


def _droppable(example: Example) -> int:
    """The number of first tokens of each chat of which at least the last one must remain, as it predicts an answer.

    These are the tokens before the last answer of a chat, and those of the common prompt of a pair. Raises UserError if
    the template yields no common prompt.
    """
    begins = [runs(chat.trained)[0] for chat in example]
    if len(example) == 1:
        return int(begins[0][-1])
    prompt = min(int(first) for first, *_ in begins)
    differs = np.not_equal(*(chat.ids[:prompt] for chat in example))
    common = int(differs.argmax()) if differs.any() else prompt
    if common == 0:
        raise UserError(
            f"{example[0].where}: the chat template yields no prompt that chosen and rejected have in common"
        )
    return common


def _split(examples: Sequence[Example], source: str) -> tuple[list[Example], list[Example]]:
    """Return the training and the validation examples: of all hashes of their tokens, the smallest are validation.

    The split does not depend on the order, and equal examples are in the same part.
    """
    contents = [b"".join(chat.ids.tobytes() for chat in example) for example in examples]
    hashes = [hashlib.blake2b(content, digest_size=8).digest() for content in contents]
    largest = sorted(hashes)[max(1, round(VALIDATION * len(hashes))) - 1]
    parts: tuple[list[Example], list[Example]] = ([], [])
    for example, value in zip(examples, hashes, strict=True):
        parts[value <= largest].append(example)
    if not parts[0]:
        raise UserError(f"{source}: no two different examples; training and validation need one each")
    return parts


def _summary(counts: list[dict[str, int | float]]) -> dict[str, Any]:
    """Return the sums over the sources; the fill of all sequences is a mean weighted by their number."""
    total = {name: sum(entry[name] for entry in counts) for name in counts[0]}
    for split in ("train", "val"):
        weighted = sum(entry[f"{split}_fill"] * entry[f"{split}_sequences"] for entry in counts)
        total[f"{split}_fill"] = weighted / total[f"{split}_sequences"]
    return total
