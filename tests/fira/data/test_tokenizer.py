import json
import unicodedata

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from fira.data.pieces import encode_documents
from fira.data.tokenizer import EOS, SPECIAL_TOKENS, eos_id, load_tokenizer, train_tokenizer, vocabulary
from fira.errors import UserError

TEXTS = ["def f(x):\n    return x\n" * 9, "the cat sat on the mat, the dog did not. " * 9, "यह हिन्दी है। " * 9]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, 400)


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_decoding_inverts_encoding_for_any_text(tokenizer: Tokenizer, text: str) -> None:
    text = unicodedata.normalize("NFC", text)
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_special_tokens_have_the_first_ids_and_are_recognised_in_a_text(tokenizer: Tokenizer) -> None:
    assert [tokenizer.token_to_id(name) for name in SPECIAL_TOKENS] == [0, 1, 2, 3, 4]
    assert tokenizer.encode("<|prompter|>Hi</s>").ids[0] == 3
    assert tokenizer.encode("<|prompter|>Hi</s>").ids[-1] == eos_id(tokenizer) == tokenizer.token_to_id(EOS)


def test_training_is_deterministic_and_respects_the_vocabulary_size(tokenizer: Tokenizer) -> None:
    assert 300 < vocabulary(tokenizer) <= 400
    assert len(tokenizer.encode(" the").ids) == 1
    assert train_tokenizer(TEXTS, 400).to_str() == tokenizer.to_str()


def test_hindi_word_is_not_split_at_its_combining_marks(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode(" हिन्दी").ids) == 1


def test_equivalent_unicode_sequences_have_equal_tokens(tokenizer: Tokenizer) -> None:
    """A nukta letter may be one or two characters, and a zero-width joiner does not end a word."""
    assert tokenizer.encode("\u0958\u0932\u092e").ids == tokenizer.encode("\u0915\u093c\u0932\u092e").ids
    words = tokenizer.pre_tokenizer.pre_tokenize_str(" क्\u200dया है, हि\u0902दी")
    assert [end - start for _, (start, end) in words] == [6, 3, 1, 6]


def test_tokens_of_frequent_words_end_between_graphemes() -> None:
    """A consonant with its vowel signs is one grapheme (\\X); half of the text is English."""
    hindi = "हिन्दी में लिखी हुई किताबें बहुत अच्छी हैं और बच्चों ने उन्हें पढ़ा। कृपया दूसरी पुस्तक भी दीजिए। " * 20
    tokenizer = train_tokenizer([hindi, *TEXTS[:2]], 500)
    for word in hindi.split():
        encoding = tokenizer.encode(" " + word)
        ends = {0, *(match.end() for match in regex.finditer(r"\X", " " + word))}
        assert {end for _, end in encoding.offsets} <= ends, encoding.tokens


def test_vocabulary_includes_gaps_between_ids() -> None:
    assert vocabulary(Tokenizer(models.WordLevel({"a": 0, "b": 41}, unk_token="a"))) == 42


def test_loaded_tokenizer_has_no_truncation_or_padding(tokenizer: Tokenizer, tmp_path) -> None:
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.enable_truncation(4)
    copy.enable_padding(length=64)
    copy.save(str(tmp_path / "t.json"))
    assert load_tokenizer(tmp_path / "t.json").encode(TEXTS[1]).ids == tokenizer.encode(TEXTS[1]).ids


@pytest.mark.parametrize("content", [None, b"", b'{"hello": 1}', b"\x00\xff\x12"])
def test_missing_or_invalid_file_is_named(tmp_path, content: bytes | None) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer\.json") as caught:
        load_tokenizer(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": ""}),  # the library panics when it loads this,
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AQAAAA=="}),  # and these when it encodes
        ("normalizer", {"type": "Prepend", "prepend": ""}),
        ("pre_tokenizer", {"type": "FixedLength", "length": 0}),
        ("model", {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "?"}),  # an Exception
        ("model", {"type": "WordLevel", "vocab": {}, "unk_token": "?"}),
    ],
)
def test_panic_or_exception_of_the_library_is_a_one_line_error(tokenizer: Tokenizer, tmp_path, part, value) -> None:
    document = json.loads(tokenizer.to_str()) | {"added_tokens": [], part: value}
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match="tokenizer") as caught:
        list(encode_documents(load_tokenizer(tmp_path / "tokenizer.json"), TEXTS))
    assert "\n" not in str(caught.value)


def test_vocabulary_smaller_than_the_bytes_raises() -> None:
    with pytest.raises(UserError, match="261"):
        train_tokenizer(TEXTS, 260)


def test_tokenizer_without_end_of_document_token_raises() -> None:
    assert eos_id(Tokenizer(models.WordLevel({"a": 0, "<|endoftext|>": 1}, unk_token="a"))) == 1
    with pytest.raises(UserError, match="end-of-document"):
        eos_id(Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
