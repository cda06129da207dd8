"""A byte-level BPE tokenizer in the metadata of a GGUF file."""

import json
import unicodedata
from typing import Any

from gguf import GGUFWriter, TokenType
from tokenizers import Tokenizer

from fira.data.tokenizer import WORDS, vocabulary
from fira.data.tokenizer_config import TokenizerConfig
from fira.errors import UserError

# llama.cpp's names of pre-tokenizers, by the pattern that splits a text into words.
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = {GPT2: "gpt-2", LLAMA3: "llama-bpe", LLAMA3.replace("{1,3}", ""): "qwen2"}
WITH_MARKS = "poro-chat"
ENOUGH_MARKS = 0.01  # share of tokens with combining marks


def add_tokenizer(writer: GGUFWriter, tokenizer: Tokenizer, config: TokenizerConfig, rows: int) -> None:
    """Write the tokens, the merges, the special tokens and the chat template.

    rows: of the embedding; ids without a token are filled up. Raises UserError if llama.cpp has no equivalent.
    """
    model = json.loads(tokenizer.to_str())["model"]
    if model["type"] != "BPE" or model.get("byte_fallback") or "ByteLevel" not in str(tokenizer.decoder):
        raise UserError("--format gguf: the tokenizer is not byte-level BPE; export to a format of transformers")
    if vocabulary(tokenizer) > rows:
        raise UserError(f"--format gguf: the tokenizer has {vocabulary(tokenizer)} ids, the model {rows} embeddings")
    if config.eos_token is None:
        raise UserError("--format gguf: the tokenizer has no end-of-document token; name it in tokenizer_config.json")
    tokens, types = _tokens(tokenizer, rows)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer_name(tokenizer))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    ids = {name: i for i, name in enumerate(tokens)}
    eos = ids[config.eos_token]
    bos = ids[config.bos_token or config.eos_token]  # without one the same as EOS, as in GPT-2
    writer.add_bos_token_id(bos)
    writer.add_eos_token_id(eos)
    writer.add_eot_token_id(eos)  # an answer ends with it
    writer.add_pad_token_id(eos)
    if config.unk_token is not None:
        writer.add_unk_token_id(ids[config.unk_token])
    writer.add_add_bos_token(tokenizer.encode("a").ids[:1] == [bos])
    writer.add_add_eos_token(False)
    if config.chat_template is not None:
        writer.add_chat_template(config.chat_template)


def pre_tokenizer_name(tokenizer: Tokenizer) -> str:
    """Return llama.cpp's name of the pattern that splits a text into words. Raises UserError if it has none.

    It has none that is equal to that of `train_tokenizer` for all texts. GPT-2's is equal for texts without combining
    marks. If the vocabulary has many tokens with them, as for Hindi, Poro's pattern is used, which keeps words whole in
    every script. It differs after single quotes, inside runs of punctuation, and in white space before punctuation.
    """
    pattern = _pattern(json.loads(tokenizer.to_str())["pre_tokenizer"])
    if pattern == WORDS:
        return WITH_MARKS if _share_with_marks(tokenizer) > ENOUGH_MARKS else PRE_TOKENIZERS[GPT2]
    if pattern not in PRE_TOKENIZERS:
        raise UserError("--format gguf: llama.cpp lacks the tokenizer's pattern; export to a format of transformers")
    return PRE_TOKENIZERS[pattern]


def _pattern(pre_tokenizer: dict[str, Any] | None) -> str | None:
    """The regular expression of a pre-tokenizer, from its JSON; None if it is not a split followed by bytes."""
    parts = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer or {}])
    if parts[-1].get("type") != "ByteLevel" or parts[-1]["add_prefix_space"]:
        return None
    if len(parts) == 1:
        return GPT2 if parts[0]["use_regex"] else None
    split = parts[0] if len(parts) == 2 and not parts[1]["use_regex"] else {}
    if split.get("type") != "Split" or split["behavior"] != "Isolated" or split["invert"]:
        return None
    pattern: str | None = split["pattern"].get("Regex")
    return pattern


def _share_with_marks(tokenizer: Tokenizer) -> float:
    """The share of the tokens that contain a combining mark, such as a vowel sign of Hindi."""
    texts = tokenizer.decode_batch([[i] for i in tokenizer.get_vocab().values()], skip_special_tokens=False)
    return sum(any(unicodedata.category(c)[0] == "M" for c in text) for text in texts) / len(texts)


def _tokens(tokenizer: Tokenizer, rows: int) -> tuple[list[str], list[TokenType]]:
    """The tokens and their types by id. Bytes are written as characters, as in tokenizer.json."""
    tokens = [f"[PAD{i}]" for i in range(rows)]
    types = [TokenType.UNUSED] * rows
    for token, i in tokenizer.get_vocab(with_added_tokens=False).items():
        tokens[i], types[i] = token, TokenType.NORMAL
    for i, added in tokenizer.get_added_tokens_decoder().items():
        tokens[i], types[i] = added.content, TokenType.CONTROL if added.special else TokenType.USER_DEFINED
    return tokens, types
