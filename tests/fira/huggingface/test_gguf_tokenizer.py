"""The name of llama.cpp's pre-tokenizer, and tokenizers that it lacks."""

import unicodedata

import pytest
from gguf import GGUFWriter
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from fira.data.tokenizer import train_tokenizer
from fira.data.tokenizer_config import TokenizerConfig, default_config
from fira.errors import UserError
from fira.huggingface.gguf_tokenizer import LLAMA3, add_tokenizer, pre_tokenizer_name
from tests.fira.huggingface.gguf_models import TEXT, make_tokenizer

HINDI = "पुस्तक में हिन्दी के वाक्य लिखे हुए हैं और बच्चे उन्हें पढ़ते हैं। किताबें दुकान में मिलती हैं। " * 3
MIXED = TEXT + 50 * HINDI


def split_by(pattern: str | None, text: str = TEXT) -> Tokenizer:
    """A tokenizer of bytes with a pattern; None: that of GPT-2, which is included in the step that makes bytes."""
    tokenizer = train_tokenizer([text], 500)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    split = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), "isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, byte_level]) if split else byte_level
    return tokenizer


def test_pattern_is_named_by_tokenizer_and_vocabulary() -> None:
    assert pre_tokenizer_name(make_tokenizer()) == "gpt-2"
    assert pre_tokenizer_name(train_tokenizer([HINDI], 400)) == "poro-chat"
    assert pre_tokenizer_name(split_by(None)) == "gpt-2"
    assert pre_tokenizer_name(split_by(LLAMA3)) == "llama-bpe"
    assert pre_tokenizer_name(split_by(LLAMA3.replace("{1,3}", ""))) == "qwen2"
    with pytest.raises(UserError, match=r"llama\.cpp lacks the tokenizer's pattern"):
        pre_tokenizer_name(split_by(r"\w+"))


def test_gpt2_splits_a_text_without_marks_as_we_do() -> None:
    ours, gpt2 = train_tokenizer([MIXED], 500), split_by(None, MIXED)
    assert ours.get_vocab() == gpt2.get_vocab()
    text = "".join(c for c in TEXT if unicodedata.category(c)[0] != "M") + "don't 'the' x  (a) 12345 3rd é -- …"
    assert ours.encode(text).ids == gpt2.encode(text).ids
    assert ours.encode(HINDI).ids != gpt2.encode(HINDI).ids


def test_tokenizer_without_equivalent_is_refused() -> None:
    good = make_tokenizer()
    words = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    sentencepiece = make_tokenizer()
    sentencepiece.decoder = decoders.ByteFallback()
    for tokenizer, config, rows, message in (
        (words, default_config(words), 2, "not byte-level BPE"),
        (sentencepiece, default_config(good), 320, "not byte-level BPE"),
        (good, default_config(good), 300, "has 310 ids, the model 300 embeddings"),
        (good, TokenizerConfig(), 320, "no end-of-document token"),
    ):
        with pytest.raises(UserError, match=message):
            add_tokenizer(GGUFWriter(None, "llama"), tokenizer, config, rows)
