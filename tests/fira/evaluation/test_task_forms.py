"""Scores of examples, and records that are not examples."""

from typing import Any

import pytest

from fira.errors import UserError
from fira.evaluation.task_forms import (
    ExactAnswer,
    LastWord,
    Likelihood,
    MinimalPair,
    MultipleChoice,
    Request,
    parse_example,
)

CHOICE = {"query": "The sky is", "choices": ["a very long answer", "blue"], "answer": 1}


def test_multiple_choice_compares_sums_and_sums_per_character() -> None:
    example = parse_example(CHOICE | {"id": 7}, "a.jsonl, line 1")
    assert isinstance(example, MultipleChoice)
    assert example.requests() == [Request("The sky is", " a very long answer"), Request("The sky is", " blue")]
    assert example.chance == 0.5
    short, long = Likelihood(-4.0, False), Likelihood(-9.0, False)  # 1 per character, and 0.5 per character
    assert example.scores([long, short]) == {"acc": 1.0, "acc_norm": 0.0}
    assert example.scores([short, Likelihood(-4.1, True)]) == {"acc": 0.0, "acc_norm": 0.0}
    assert example.scores([Likelihood(-90.0, True), Likelihood(-4.0, False)]) == {"acc": 1.0, "acc_norm": 1.0}


def test_length_is_counted_in_characters_not_in_bytes() -> None:
    example = parse_example({"query": "", "choices": ["नमस्ते", "hello!"], "answer": 0}, "x")
    assert example.scores([Likelihood(-6.0, False), Likelihood(-6.5, False)]) == {"acc": 1.0, "acc_norm": 1.0}


def test_minimal_pair() -> None:
    example = parse_example({"sentence_good": "He is.", "sentence_bad": "He are.", "UID": "x"}, "x")
    assert isinstance(example, MinimalPair)
    assert example.requests() == [Request("", " He is."), Request("", " He are.")]
    assert example.scores([Likelihood(-1, False), Likelihood(-2, False)]) == {"acc": 1.0}
    assert example.scores([Likelihood(-3, False), Likelihood(-2, False)]) == {"acc": 0.0}


def test_last_word_is_what_follows_the_last_space() -> None:
    example = parse_example({"text": "One two\nthree four."}, "x")
    assert isinstance(example, LastWord)
    assert example.requests() == [Request("One two\nthree", " four.")]
    assert example.scores([Likelihood(-1.5, True)]) == {"acc": 1.0, "perplexity": -1.5}
    assert example.scores([Likelihood(-1.5, False)])["acc"] == 0.0
    assert parse_example({"text": "alone"}, "x").requests() == [Request("", " alone")]


def test_exact_answer_is_compared_without_spaces_around_it() -> None:
    example = parse_example({"prompt": "2 + 2 =", "answer": " 4"}, "x")
    assert example == ExactAnswer("2 + 2 =", "4", ("\n",), 64)
    assert [example.scores(text)["exact_match"] for text in ("4", " 4 ", "4.", "", "2 4")] == [1, 1, 0, 0, 0]
    record = {"prompt": "2 + 2 =", "answer": "4", "stop": [";", "\n\n"], "max_tokens": 3}
    assert parse_example(record, "x") == ExactAnswer("2 + 2 =", "4", (";", "\n\n"), 3)


def test_exact_answer_after_a_marker_is_compared_without_the_solution() -> None:
    record = {"prompt": "2 + 2 =", "answer": "4", "after": "so "}
    for answer in ("4", "2+2=4 so 4 ", "so 5 so 4"):
        example = parse_example(record | {"answer": answer}, "x")
        assert example == ExactAnswer("2 + 2 =", "4", ("\n",), 64, "so ")
        scores = [example.scores(text)["exact_match"] for text in ("1+3=4 so 4", "so 5 so 4", "4", "so 4 so 5", "")]
        assert scores == [1, 1, 0, 0, 0]


CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is blue?"}]


def test_questions_may_be_messages() -> None:
    example = parse_example(CHOICE | {"query": CHAT}, "x")
    assert example == MultipleChoice(CHAT, ("a very long answer", "blue"), 1)
    assert example.requests() == [Request(CHAT, "a very long answer"), Request(CHAT, "blue")]
    assert parse_example({"prompt": CHAT, "answer": "4"}, "x") == ExactAnswer(CHAT, "4", (), 64)
    stopped = parse_example({"prompt": CHAT, "answer": "4", "stop": ";"}, "x")
    assert stopped == ExactAnswer(CHAT, "4", (";",), 64)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({}, "x: has no fields; give the fields of one form"),
        (
            {"query": "?", "choices": ["a", "b"]},
            "x: has 'query', 'choices'; give the fields of one form: query, choices",
        ),
        (CHOICE | {"answer": 2}, "x: answer is 2, not the number of a choice, 0 to 1"),
        (CHOICE | {"answer": -1}, "x: answer is -1, not"),
        (CHOICE | {"answer": True}, "x: answer is True, not"),
        (CHOICE | {"answer": "blue"}, "x: answer is 'blue', not"),
        (CHOICE | {"choices": ["a", " "]}, "x: choice 1 is empty"),
        (CHOICE | {"choices": []}, "x: choices is not a list of at least two texts"),
        (CHOICE | {"choices": "ab"}, "x: choices is not a list"),
        (CHOICE | {"choices": ["a", 1]}, "x: choice 1 is int, not text"),
        (CHOICE | {"query": None}, "x: query is NoneType, not text"),
        ({"sentence_good": "a", "sentence_bad": ""}, "x: sentence_bad is empty"),
        ({"text": "ends with "}, "x: text ends with a space"),
        ({"prompt": "a", "answer": ""}, "x: answer is empty"),
        ({"prompt": "a", "answer": 4}, "x: answer is int, not text"),
        ({"prompt": "a", "answer": "4", "stop": [""]}, "x: stop is neither a text nor a list of texts"),
        ({"prompt": "a", "answer": "4", "stop": 1}, "x: stop is neither a text nor a list of texts"),
        ({"prompt": "a", "answer": "4", "after": " "}, "x: after is empty"),
        ({"prompt": "a", "answer": "4", "after": 1}, "x: after is int, not text"),
        ({"prompt": "a", "answer": "1 so ", "after": "so"}, "x: answer is empty after 'so'"),
        ({"prompt": "a", "answer": "4", "max_tokens": 0}, "x: max_tokens is 0, not a number of at least 1"),
        ({"text": 3}, "x: text is int, not text"),
        (CHOICE | {"query": []}, "x: query: no message; give at least one"),
        (CHOICE | {"query": [{"role": "user"}]}, "x: query, message 1: content is NoneType, not text"),
        (CHOICE | {"query": [*CHAT, {"role": "assistant", "content": "b"}]}, "x: query ends with an answer; end it"),
        ({"prompt": ["a"], "answer": "4"}, "x: prompt, message 1: str, not an object"),
    ],
)
def test_invalid_records_are_named(record: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        parse_example(record, "x")
    assert str(error.value).startswith(message)
