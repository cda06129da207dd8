"""Values that types allow, and the messages for those that they do not allow."""

from argparse import ArgumentTypeError
from typing import Any

import pytest

from fira.errors import UserError
from fira.value_types import (
    AnyText,
    ClosedShare,
    Fraction,
    PathName,
    Positive,
    Seed,
    Share,
    Size,
    check,
    flag_type,
)

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("hint", "allowed", "refused", "text"),
    [
        (int, [1, 2**31 - 1], [0, -1, 2**31, 1.0, True, "1", None, NAN], "an integer of at least 1"),
        (float, [-1e308, 0, 0.5], [NAN, INF, -INF, 10**400, True, "0"], "a finite number"),
        (Size | None, [1, 2**18, None], [0, 2**18 + 1, [1]], "an integer from 1 to 262,144 or none"),
        (Size | Share, [1, 4, 0.5, 1.0], [0, 0.0, 1.5], "an integer from 1 to 262,144 or a number greater than 0 and"),
        (Positive, [1e-300, 1], [0, -1, INF], "a number greater than 0"),
        (Fraction, [0, 0.999], [1, -0.1], "a number of at least 0 and less than 1"),
        (ClosedShare, [0, 1], [1.1], "a number from 0 to 1"),
        (Seed, [0, 2**63 - 1], [-1, 2**63], "an integer from 0 to 9,223,372,036,854,775,807"),
        (bool, [True, False], [0, 1, "true"], "true or false"),
        (str, ["a", "हिन्दी", "a b"], ["", " ", "a\nb", "a\0", "\udcff", 1, b"a"], "a text without control characters"),
        (AnyText, ["", " "], ["\t"], "a text without control characters"),
        (PathName, ["a/" * 99, "x" * 255], ["", " ", "x" * 256, "अ" * 86, "ab/" * 1400], "a path with names"),
    ],
)
def test_values_of_types(hint: Any, allowed: list[Any], refused: list[Any], text: str) -> None:
    for value in allowed:
        check("--x", value, hint)
    for value in refused:
        with pytest.raises(UserError) as error:
            check("--x", value, hint)
        assert str(error.value).startswith(f"--x: give {text}")
        assert "\n" not in str(error.value)


def test_flags_are_parsed_and_checked() -> None:
    assert flag_type(Size | Share)("3") == 3
    assert flag_type(Size | Share)("0.5") == 0.5
    assert flag_type(float)("-1e3") == -1000.0
    assert flag_type(str)("nan") == "nan"
    for hint, text in ((int, "9" * 5000), (float, "1e999"), (Size | None, "none"), (float, "nan"), (str, "")):
        with pytest.raises(ArgumentTypeError, match=r"^give (a|an) .*, not '"):
            flag_type(hint)(text)


def test_values_in_messages_are_short() -> None:
    for value, shown in (("x" * 10**6, "x'…"), (16**10000, "not an integer of 40,001 bits"), ([[]], "not a list")):
        with pytest.raises(UserError, match=f"{shown}$") as error:
            check("--x", value, Seed)
        assert len(str(error.value)) < 200
