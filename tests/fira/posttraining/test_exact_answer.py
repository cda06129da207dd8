"""Final answers of texts."""

import pytest

from fira.posttraining.exact_answer import final_answer, same_answer

SOLUTION = "3+4=7 so far; 7-2=5 so 5"


@pytest.mark.parametrize(
    ("text", "after", "answer"),
    [
        (SOLUTION, "so ", "5"),
        (" so 5 \n", "so ", "5"),
        ("so", "so ", None),
        ("3+4=7", "so ", None),
        ("7 so ", "so ", ""),
        (" 7 \n", None, "7"),
        ("", None, ""),
        ("a #### 1,200", "####", "1,200"),
    ],
)
def test_final_answer_follows_the_last_marker(text: str, after: str | None, answer: str | None) -> None:
    assert final_answer(text, after) == answer


def test_same_answer_compares_what_follows_the_marker() -> None:
    assert same_answer("1+4=5 so  5 ", SOLUTION, "so ")
    assert not same_answer("3+4=7 7-2=5 so 6", SOLUTION, "so ")
    assert not same_answer("5", SOLUTION, "so ")
    assert not same_answer("5", "5", "so ")  # neither has an answer
    assert same_answer("5 ", "5", None)
    assert not same_answer("1+4=5 so 5", SOLUTION, None)
