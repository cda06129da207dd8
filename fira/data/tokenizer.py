"""Train or load a byte-level BPE tokenizer, a `tokenizers.Tokenizer`."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from fira.errors import UserError
from fira.files import one_line, read

TOKENIZER = "tokenizer.json"  # file name in checkpoints and exports
EOS = "</s>"
PROMPTER, ASSISTANT = "<|prompter|>", "<|assistant|>"
SPECIAL_TOKENS = ["[UNK]", "<s>", EOS, PROMPTER, ASSISTANT]
# Names of the end-of-document token in published tokenizers.
END_NAMES = [EOS, "<|endoftext|>", "<|end_of_text|>", "<eos>"]
# GPT-2's pre-tokenization, except that combining marks and zero-width joiners belong to a word: GPT-2's pattern splits
# Hindi words at every vowel sign.
WORDS = r"'(?:[sdmt]|ll|ve|re)| ?[\p{L}\p{M}][\p{L}\p{M}\u200C\u200D]*| ?\p{N}+| ?[^\s\p{L}\p{M}\p{N}]+|\s+(?!\S)|\s+"
MIN_VOCABULARY = len(SPECIAL_TOKENS) + 256  # a token for every byte


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train byte-level BPE (Sennrich et al. 2016, on bytes as in GPT-2) with at most `vocab_size` tokens.

    A small text yields fewer tokens. Text is normalised to NFC, so that equivalent character sequences have equal
    tokens; apart from this, `decode(encode(text).ids, skip_special_tokens=False) == text`. Names of special tokens
    inside a text are encoded as these tokens, so that chats marked with `<|prompter|>` and `<|assistant|>` need no
    preprocessing. Raises UserError if `vocab_size` is less than MIN_VOCABULARY.
    """
    if vocab_size < MIN_VOCABULARY:
        raise UserError(
            f"vocabulary of {vocab_size}: bytes and special tokens need {MIN_VOCABULARY}; give at least this"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a `tokenizer.json`, without truncation and padding. Raises UserError for a missing or invalid file."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such tokenizer; give a tokenizer.json, o200k_base or r50k_base")
    return parse_tokenizer(read(Path(path)), Path(path))


def parse_tokenizer(raw: bytes, source: Path) -> Tokenizer:
    """Parse the content of the `tokenizer.json` named `source`; see `load_tokenizer`."""
    with library_errors(f"{source}: not a tokenizer.json of the tokenizers library"):
        tokenizer = Tokenizer.from_buffer(raw)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if not tokenizer.get_vocab_size():
            raise ValueError("no tokens")
        return tokenizer


@contextmanager
def library_errors(message: str) -> Iterator[None]:
    """Raise an error of the tokenizers library as a UserError that begins with `message`.

    The library raises Exception itself, or a PanicException, which is a BaseException and cannot be imported.
    """
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{message} ({one_line(error)})") from None


def with_role_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """Return a copy of a tokenizer that has the tokens of the roles in a chat; those that are missing get new ids."""
    extended = Tokenizer.from_str(tokenizer.to_str())
    extended.add_special_tokens([token for token in (PROMPTER, ASSISTANT) if extended.token_to_id(token) is None])
    return extended


def vocabulary(tokenizer: Tokenizer) -> int:
    """Return the greatest id plus one, the rows of an embedding; ids may have gaps."""
    return 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())


def eos_id(tokenizer: Tokenizer) -> int:
    """Return the id of the end-of-document token, the first of END_NAMES. Raises UserError if there is none."""
    for name in END_NAMES:
        if (token := tokenizer.token_to_id(name)) is not None:
            return token
    raise UserError(f"the tokenizer has no end-of-document token (one of {' '.join(END_NAMES)}); add one to it")
