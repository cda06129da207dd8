"""Allowed values of settings, declared as types and checked in one place.

    dropout: Fraction = 0.1                          field of a dataclass: `check(where, value, hint)`
    parser.add_argument("--ranks", type=Size)        flag of `fira.cli.Parser`: checked by FLAG_TYPES[Size]

An alias such as Size is an annotated type, so that type checkers see an int. A plain `int` is a count of at least 1, a
plain `float` is any finite number, and a plain `str` is one line of text that is not blank.
"""

import os
import sys
from argparse import ArgumentTypeError
from dataclasses import dataclass
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Annotated, Any, Protocol, Union, get_args, get_origin
from unicodedata import category

from fira.errors import UserError

LONGEST_NAME, LONGEST_PATH = 255, 4096  # bytes; NAME_MAX and PATH_MAX of Linux
LONGEST_SHOWN = 80  # characters
LARGEST_INT, LARGEST_FLOAT = 2**31 - 1, sys.float_info.max
SMALLEST_FP32 = 1.2e-38  # without a loss of digits


class Allowed(Protocol):
    """A set of values. Its text follows "give": "a number from 0 to 1"."""

    def __contains__(self, value: Any) -> bool: ...

    def parse(self, text: str) -> Any:
        """The value that a text denotes. Raises ValueError if it denotes none."""


@dataclass(frozen=True)
class Range:
    """The finite numbers of one kind, int or float, from `low` to `high` without those in `excluded`."""

    kind: type
    low: float = -LARGEST_FLOAT
    high: float = LARGEST_FLOAT
    excluded: tuple[float, ...] = ()

    def __contains__(self, value: Any) -> bool:
        is_kind = isinstance(value, Integral if self.kind is int else Real) and not isinstance(value, bool)
        return is_kind and self.low <= value <= self.high and value not in self.excluded

    def __str__(self) -> str:
        noun = "an integer" if self.kind is int else "a number"
        if self.low == -LARGEST_FLOAT:
            return "a finite number"
        low, high = f"{self.low:,}", f"{self.high:,}"
        if self.high in (LARGEST_INT, LARGEST_FLOAT):
            return f"{noun} greater than {low}" if self.low in self.excluded else f"{noun} of at least {low}"
        if not self.excluded:
            return f"{noun} from {low} to {high}"
        above = "greater than" if self.low in self.excluded else "of at least"
        return f"{noun} {above} {low} and {'less than' if self.high in self.excluded else 'at most'} {high}"

    def parse(self, text: str) -> int | float:
        return self.kind(text)


@dataclass(frozen=True)
class Text:
    """One line of text. blank: whether it may be empty or blank. path: whether it names a file or a folder."""

    blank: bool = False
    path: bool = False

    def __contains__(self, value: Any) -> bool:
        if not isinstance(value, str) or not (value.strip() or self.blank):
            return False
        if any(category(character) in ("Cc", "Cs") for character in value):  # control characters and surrogates
            return False
        names = [os.fsencode(name) for name in value.split("/")] if self.path else []
        return max(map(len, names), default=0) <= LONGEST_NAME and sum(map(len, names)) + len(names) <= LONGEST_PATH

    def __str__(self) -> str:
        noun = f"a path with names of at most {LONGEST_NAME} bytes" if self.path else "a text"
        return f"{noun} without control characters" + ("" if self.blank else " that is not blank")

    def parse(self, text: str) -> str:
        return text


@dataclass(frozen=True)
class Word:
    """One of a few values that a file can contain, but not a flag."""

    values: tuple[Any, ...]
    text: str

    def __contains__(self, value: Any) -> bool:
        return any(value is allowed for allowed in self.values)

    def __str__(self) -> str:
        return self.text

    def parse(self, text: str) -> Any:
        raise ValueError


PLAIN: dict[Any, Allowed] = {
    int: Range(int, 1, LARGEST_INT),
    float: Range(float),
    str: Text(),
    bool: Word((True, False), "true or false"),
    NoneType: Word((None,), "none"),
}

# The product of three sizes and of the bytes of a number is below 2**63, the largest number of bytes in torch.
Size = Annotated[int, Range(int, 1, 2**18)]  # of a dimension of the model or of the layout
Threads = Annotated[int, Range(int, 1, 2**10)]
Layers = Annotated[int, Range(int, 1, 2**10)]
Tokens = Annotated[int, Range(int, 1, 2**24)]  # in a vocabulary or in a sequence
Sequences = Annotated[int, Range(int, 1, 2**20)]  # in a batch
Seed = Annotated[int, Range(int, 0, 2**63 - 1)]
Steps = Annotated[int, Range(int, 0, LARGEST_INT)]
Port = Annotated[int, Range(int, 0, 2**16 - 1)]
Seconds = Annotated[float, Range(float, 0, 10**9, excluded=(0,))]
Positive = Annotated[float, Range(float, 0, excluded=(0,))]
InFp32 = Annotated[float, Range(float, SMALLEST_FP32)]  # positive, and not rounded to 0 in fp32
NotNegative = Annotated[float, Range(float, 0)]
RepetitionPenalty = Annotated[float, Range(float, 1e-3, 10**3)]
PresencePenalty = Annotated[float, Range(float, -(10**3), 10**3)]
Fraction = Annotated[float, Range(float, 0, 1, excluded=(1,))]
Share = Annotated[float, Range(float, 0, 1, excluded=(0,))]
ClosedShare = Annotated[float, Range(float, 0, 1)]
OpenShare = Annotated[float, Range(float, 0, 1, excluded=(0, 1))]
AnyText = Annotated[str, Text(blank=True)]
PathName = Annotated[str, Text(path=True)]


def check(where: str, value: Any, hint: Any) -> None:
    """Raise UserError if a value is not of a type. where: the flag, or the file and the key, of the value."""
    allowed = _allowed(hint)
    if not any(value in values for values in allowed):
        raise UserError(f"{where}: give {' or '.join(map(str, allowed))}, not {_shown(value)}")


def flag_type(hint: Any) -> "FlagType":
    """The `type` of an argument of argparse for a type other than bool."""
    return FlagType(_allowed(hint))


@dataclass(frozen=True)
class FlagType:
    """Parses the text of a flag. Raises ArgumentTypeError if it denotes no allowed value."""

    allowed: tuple[Allowed, ...]

    def __call__(self, text: str) -> Any:
        for values in self.allowed:
            try:
                value = values.parse(text)
            except ValueError:
                continue
            if value in values:
                return value
        choices = [str(values) for values in self.allowed if not isinstance(values, Word)]
        raise ArgumentTypeError(f"give {' or '.join(choices)}, not {_shown(text)}")

    def ranges(self) -> str:
        """The allowed numbers, for --help; empty if the flag is not a number."""
        return " or ".join(str(values) for values in self.allowed if isinstance(values, Range))


def _allowed(hint: Any) -> tuple[Allowed, ...]:
    """The sets of values of a plain type, an annotated type, or a union of such types."""
    if get_origin(hint) in (Union, UnionType):
        return tuple(values for part in get_args(hint) for values in _allowed(part))
    return (get_args(hint)[1] if get_origin(hint) is Annotated else PLAIN[hint],)


def _shown(value: Any) -> str:
    """A value in an error message: of a list or table only its kind, because it may be deeply nested."""
    if isinstance(value, str):
        return repr(value) if len(value) <= LONGEST_SHOWN else f"{value[:LONGEST_SHOWN]!r}…"
    if isinstance(value, int) and value.bit_length() > 4 * LONGEST_SHOWN:
        return f"an integer of {value.bit_length():,} bits"
    plain = value is None or isinstance(value, int | float)
    return str(value).lower() if plain else f"a {type(value).__name__}"


FLAG_TYPES: dict[Any, FlagType] = {
    hint: flag_type(hint) for hint in (int, float, str, PathName, Sequences, Size, Tokens)
}
