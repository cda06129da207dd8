"""Tokens of requests; `test_tasks` compares them with lm-eval."""

import pytest
from tokenizers import Tokenizer, processors

from fira.data.tokenizer_config import TokenizerConfig, default_config
from fira.errors import UserError
from fira.evaluation.request_encoding import EncodedRequest, RequestEncoder
from fira.evaluation.task_forms import ExactAnswer, Request
from tests.chats import encode

CONTEXT, CONTINUATION = "Die Bäume stehen", " im Wald."


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


@pytest.fixture
def encoder(tokenizer: Tokenizer) -> RequestEncoder:
    return RequestEncoder(tokenizer, default_config(tokenizer), 40)


def test_context_and_continuation_are_encoded_together(tokenizer: Tokenizer, encoder: RequestEncoder) -> None:
    whole = ids(tokenizer, CONTEXT + CONTINUATION)
    scored = len(whole) - len(ids(tokenizer, CONTEXT))
    assert encoder.request(Request(CONTEXT, CONTINUATION), "x") == EncodedRequest(whole, scored, truncated=False)


def test_spaces_at_the_end_of_the_context_are_scored(tokenizer: Tokenizer, encoder: RequestEncoder) -> None:
    found = encoder.request(Request(CONTEXT + " \n", CONTINUATION), "x")
    assert found.tokens == ids(tokenizer, CONTEXT + " \n" + CONTINUATION)
    assert tokenizer.decode(found.tokens[-found.scored :]) == " \n" + CONTINUATION


def test_empty_context_is_bos_or_eos(tokenizer: Tokenizer, encoder: RequestEncoder) -> None:
    bos, eos = map(tokenizer.token_to_id, ("<s>", "</s>"))
    alone = ids(tokenizer, CONTINUATION)
    assert encoder.request(Request("", CONTINUATION), "x") == EncodedRequest([bos, *alone], len(alone), False)
    without = RequestEncoder(tokenizer, TokenizerConfig(eos_token="</s>"), 40)
    assert without.request(Request("", CONTINUATION), "x").tokens == [eos, *alone]
    first = encoder.request(Request("", "<s>Wald"), "x")  # the text has a BOS of its own
    assert (first.tokens, first.scored) == ([bos, *ids(tokenizer, "Wald")], len(ids(tokenizer, "Wald")))
    with pytest.raises(UserError, match="neither a BOS nor an EOS"):
        RequestEncoder(tokenizer, TokenizerConfig(), 40)


def test_tokenizer_that_adds_bos(tokenizer: Tokenizer) -> None:
    adding = Tokenizer.from_str(tokenizer.to_str())
    bos = adding.token_to_id("<s>")
    adding.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    encoder = RequestEncoder(adding, default_config(adding), 40)
    found = encoder.request(Request(CONTEXT, CONTINUATION), "x")
    assert found.tokens == [bos, *ids(tokenizer, CONTEXT + CONTINUATION)]
    assert found.scored == len(ids(tokenizer, CONTEXT + CONTINUATION)) - len(ids(tokenizer, CONTEXT))
    assert encoder.request(Request("<s>" + CONTEXT, CONTINUATION), "x") == found
    assert encoder.request(Request("", CONTINUATION), "x").tokens == [bos, *ids(tokenizer, CONTINUATION)]


def test_long_context_loses_its_beginning(tokenizer: Tokenizer) -> None:
    whole, continuation = ids(tokenizer, CONTEXT * 9 + CONTINUATION), ids(tokenizer, CONTINUATION)
    encoder = RequestEncoder(tokenizer, default_config(tokenizer), len(continuation))
    assert encoder.request(Request(CONTEXT * 9, CONTINUATION), "x") == EncodedRequest(
        whole[-len(continuation) - 1 :], len(continuation), truncated=True
    )
    exact = RequestEncoder(tokenizer, default_config(tokenizer), len(whole) - 1)
    assert exact.request(Request(CONTEXT * 9, CONTINUATION), "x").truncated is False
    short = RequestEncoder(tokenizer, default_config(tokenizer), len(continuation) - 1)
    with pytest.raises(UserError, match=f"^a, line 3: a continuation of {len(continuation)} tokens, the model's"):
        short.request(Request(CONTEXT, CONTINUATION), "a, line 3")


def test_continuation_without_a_token_is_refused(encoder: RequestEncoder) -> None:
    with pytest.raises(UserError, match=r"^a, line 3: '<s>' has no token of its own"):
        encoder.request(Request("", "<s>"), "a, line 3")


def test_prompt_leaves_room_for_its_answer(tokenizer: Tokenizer, encoder: RequestEncoder) -> None:
    long = ids(tokenizer, CONTEXT * 9)
    assert encoder.prompt(ExactAnswer(CONTEXT * 9, "4", (";",), 30), "x") == (long[-10:], (";",), 30, True)
    assert encoder.prompt(ExactAnswer("Wald", "4", (), 30), "x") == (ids(tokenizer, "Wald"), (), 30, False)
    assert len(encoder.prompt(ExactAnswer(CONTEXT, "4", (), 39), "x").tokens) == 1
    with pytest.raises(UserError, match=r"^a, line 3: an answer of up to 40 tokens, the model's context is 40"):
        encoder.prompt(ExactAnswer(CONTEXT, "4", (), 40), "a, line 3")


def test_conversation_is_rendered_up_to_the_beginning_of_the_answer(tokenizer: Tokenizer) -> None:
    turns = ("Wald </s>", "Bäume", "Und?")
    messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns)]
    encoder = RequestEncoder(tokenizer, default_config(tokenizer), 100)
    literal = Tokenizer.from_str(tokenizer.to_str())
    literal.encode_special_tokens = True
    expected = [*encode(literal, messages)[0], tokenizer.token_to_id("<|assistant|>")]
    example = ExactAnswer(tuple(messages), "4", (), 30)
    assert encoder.prompt(example, "x") == (expected, (), 30, False)
    short = RequestEncoder(tokenizer, default_config(tokenizer), 40)
    assert short.prompt(example, "x") == (expected[-10:], (), 30, True)
    without = RequestEncoder(tokenizer, TokenizerConfig(eos_token="</s>"), 40)
    with pytest.raises(UserError, match="no chat template"):
        without.prompt(example, "x")
    refused = ExactAnswer(({"role": "tool", "content": "3"}, messages[-1]), "4", (), 30)
    with pytest.raises(UserError, match=r"^a, line 3: .*tool are not supported"):
        encoder.prompt(refused, "a, line 3")
