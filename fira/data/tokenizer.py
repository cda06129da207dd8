"""Byte-level BPE tokenizers: train one, or read one. What comes back is `tokenizers.Tokenizer` itself."""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from fira.errors import UserError

TOKENIZER = "tokenizer.json"  # the name of the file in checkpoints and exports
EOS = "</s>"
PROMPTER, ASSISTANT = "<|prompter|>", "<|assistant|>"
SPECIAL_TOKENS = ["[UNK]", "<s>", EOS, PROMPTER, ASSISTANT]
END_NAMES = [EOS, "<|endoftext|>", "<|end_of_text|>", "<eos>"]  # what published tokenizers call it
# A conversation in the language of transformers' `apply_chat_template`, as fira.generation.chat has it; a system's
# message is one more of the prompter's.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role == "assistant" -%}
<|assistant|>{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}
{%- else -%}
<|prompter|>{{ message.content }}{{ eos_token }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}
"""
# GPT-2's split into words, except that combining marks belong to the word, and joiners in it: without them a Hindi word
# falls to pieces
WORDS = Regex(
    r"'(?:[sdmt]|ll|ve|re)| ?[\p{L}\p{M}][\p{L}\p{M}\u200C\u200D]*| ?\p{N}+| ?[^\s\p{L}\p{M}\p{N}]+|\s+(?!\S)|\s+"
)
SMALLEST = len(SPECIAL_TOKENS) + 256  # every byte needs a token


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE (Sennrich et al. 2016 on bytes, as GPT-2) of at most `vocab_size` tokens; little text gives fewer.

    Text is normalised to NFC first: what looks the same is the same tokens. Otherwise lossless: for any text in NFC
    `decode(encode(text).ids, skip_special_tokens=False) == text`. The special tokens' names are
    recognised inside a text, so that a chat marked with `<|prompter|>` and `<|assistant|>` needs no other treatment.
    """
    if vocab_size < SMALLEST:
        raise UserError(f"vocabulary of {vocab_size}: bytes and special tokens alone are {SMALLEST}; ask for more")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(WORDS, behavior="isolated"),
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
    """Read a `tokenizer.json`, with any truncation or padding it asks for switched off."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such tokenizer; give the path of a tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no narrower class
        raise UserError(f"{path}: not a tokenizer.json of the tokenizers library ({error})") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def vocabulary(tokenizer: Tokenizer) -> int:
    """One more than the greatest id, which is what an embedding needs (ids may have gaps, so not the count)."""
    return 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())


def eos_id(tokenizer: Tokenizer) -> int:
    """The id that ends a document: `</s>`, or what published tokenizers have in its place."""
    for name in END_NAMES:
        if (token := tokenizer.token_to_id(name)) is not None:
            return token
    raise UserError(f"the tokenizer has no end-of-document token (one of {' '.join(END_NAMES)}); add one to it")
