import unicodedata

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from fira.data.tokenizer import EOS, SPECIAL_TOKENS, eos_id, load_tokenizer, train_tokenizer, vocabulary
from fira.errors import UserError

TEXTS = ["def f(x):\n    return x\n" * 9, "the cat sat on the mat, the dog did not. " * 9, "यह हिन्दी है। " * 9]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, 400)


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_any_text_survives(tokenizer: Tokenizer, text: str) -> None:
    text = unicodedata.normalize("NFC", text)
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_special_tokens_come_first_and_are_found_in_a_text(tokenizer: Tokenizer) -> None:
    assert [tokenizer.token_to_id(name) for name in SPECIAL_TOKENS] == [0, 1, 2, 3, 4]
    assert tokenizer.encode("<|prompter|>Hi</s>").ids[0] == 3
    assert tokenizer.encode("<|prompter|>Hi</s>").ids[-1] == eos_id(tokenizer) == tokenizer.token_to_id(EOS)


def test_merges_are_learnt_within_the_limit_and_the_same_each_time(tokenizer: Tokenizer) -> None:
    assert 300 < vocabulary(tokenizer) <= 400
    assert len(tokenizer.encode(" the").ids) == 1
    assert train_tokenizer(TEXTS, 400).to_str() == tokenizer.to_str()


def test_a_hindi_word_is_not_split_at_its_marks(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode(" हिन्दी").ids) == 1


def test_hindi_is_one_text_however_it_was_typed(tokenizer: Tokenizer) -> None:
    """Nukta letters as one character or two are the same tokens, and a joiner does not end a word."""
    assert tokenizer.encode("\u0958\u0932\u092e").ids == tokenizer.encode("\u0915\u093c\u0932\u092e").ids
    words = tokenizer.pre_tokenizer.pre_tokenize_str(" क्\u200dया है, हि\u0902दी")
    assert [end - start for _, (start, end) in words] == [6, 3, 1, 6]


def test_no_token_ends_inside_a_grapheme_of_a_frequent_word() -> None:
    """A consonant with its signs is one grapheme (\\X); a mixture half of which is English leaves room for that."""
    hindi = "हिन्दी में लिखी हुई किताबें बहुत अच्छी हैं और बच्चों ने उन्हें पढ़ा। कृपया दूसरी पुस्तक भी दीजिए। " * 20
    tokenizer = train_tokenizer([hindi, *TEXTS[:2]], 500)
    for word in hindi.split():
        encoding = tokenizer.encode(" " + word)
        ends = {0, *(match.end() for match in regex.finditer(r"\X", " " + word))}
        assert {end for _, end in encoding.offsets} <= ends, encoding.tokens


def test_vocabulary_counts_gaps() -> None:
    assert vocabulary(Tokenizer(models.WordLevel({"a": 0, "b": 41}, unk_token="a"))) == 42


def test_load_is_what_was_saved_without_truncation(tokenizer: Tokenizer, tmp_path) -> None:
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.enable_truncation(4)
    copy.enable_padding(length=64)
    copy.save(str(tmp_path / "t.json"))
    assert load_tokenizer(tmp_path / "t.json").encode(TEXTS[1]).ids == tokenizer.encode(TEXTS[1]).ids


@pytest.mark.parametrize("content", [None, b"", b'{"hello": 1}', b"\x00\xff\x12"])
def test_a_missing_or_foreign_file_is_named(tmp_path, content: bytes | None) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer\.json") as caught:
        load_tokenizer(path)
    assert "\n" not in str(caught.value)


def test_a_vocabulary_below_the_bytes_is_refused() -> None:
    with pytest.raises(UserError, match="261"):
        train_tokenizer(TEXTS, 260)


def test_a_tokenizer_that_cannot_end_a_document_is_refused() -> None:
    assert eos_id(Tokenizer(models.WordLevel({"a": 0, "<|endoftext|>": 1}, unk_token="a"))) == 1
    with pytest.raises(UserError, match="end-of-document"):
        eos_id(Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
