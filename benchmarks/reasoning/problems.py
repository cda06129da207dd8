"""Multi-step problems with worked solutions. The number of steps is the difficulty; here it is 2.

    addition     47 + 85 = ?                                          7+5=12 4+8+1=13 so 132
    comparison   Eve is 3. Bob is 7. Ann is 5. Who is oldest?         Eve 3 or Bob 7 is Bob;
                                                                      Bob 7 or Ann 5 is Bob so Bob
    boolean      (3<5 and 7<2) or not 8<6 = ?                         3<5 is true; 7<2 is false;
                                                                      true and false is false;
                                                                      not 8<6 is true;
                                                                      false or true is true so true
    words        Tom has 3 pens. Ann has 9 cups. Tom buys 4 pens.
                 Tom loses 2 pens. How many pens has Tom?             3+4=7 7-2=5 so 5

The order of the operands of a commutative operation is random, and a share of the steps can have a wrong result, from
which the following steps continue. A problem belongs to training, validation or test by the hash of its text, so that
no problem is in two of them.
"""

import hashlib
import itertools
import random
from collections.abc import Callable
from typing import NamedTuple, TypeVar

NAMES = ("Ann", "Bob", "Eve", "Ida", "Kim", "Leo", "Max", "Sam", "Tom", "Zoe")
THINGS = ("pens", "cups", "keys", "maps", "nuts", "pins")
GAINS, LOSSES = ("buys", "finds", "gets"), ("loses", "sells", "gives away")
T = TypeVar("T")
TRAINING, VALIDATION, TEST = PARTS = ("training", "validation", "test")
SHARES = (0.8, 0.1, 0.1)  # of all problems


class Problem(NamedTuple):
    """The text of a problem, its answer, and a written solution, which may have errors, with the answer it leads to."""

    kind: str
    steps: int
    question: str
    answer: str
    solution: str
    written: str

    @property
    def completion(self) -> str:
        """The text to learn: the solution, and its answer after "so"."""
        return f"{self.solution} so {self.written}"


class Writer:
    """Writes steps of solutions in varied ways, with errors. errors: share of the steps with a wrong result."""

    def __init__(self, seed: int, errors: float) -> None:
        self.chooser, self.errors = random.Random(seed), errors

    def order(self, a: T, b: T) -> list[T]:
        """The operands of a commutative operation in a random order."""
        return self.chooser.sample((a, b), 2)

    def result(self, right: T, wrong: T) -> T:
        """The result of a step. The following steps continue from it."""
        return wrong if self.chooser.random() < self.errors else right

    def number(self, right: int) -> int:
        """The result of a step that is a number; a wrong one is one too large, or one too small."""
        return self.result(right, right + self.chooser.choice((-1, 1) if right else (1,)))


def addition(steps: int, writer: Writer) -> Problem:
    """The sum of two numbers of `steps` digits, digit by digit with carries."""
    a, b = (writer.chooser.randrange(10 ** (steps - 1), 10**steps) for _ in range(2))
    lines, carry, written = [], 0, ""
    for place in range(steps):
        digits = [*writer.order(a // 10**place % 10, b // 10**place % 10), *[1] * carry]
        result = writer.number(sum(digits))
        lines.append(f"{'+'.join(map(str, digits))}={result}")
        carry, written = result // 10, f"{result % 10}{written}"
    return Problem("addition", steps, f"{a} + {b} = ?", str(a + b), " ".join(lines), f"{carry or ''}{written}")


def comparison(steps: int, writer: Writer) -> Problem:
    """The oldest of `steps` + 1 people of different age, by one comparison after the other."""
    chooser = writer.chooser
    people = [*zip(chooser.sample(NAMES, steps + 1), chooser.sample(range(1, 10), steps + 1), strict=True)]
    best, lines = people[0], []
    for other in people[1:]:
        younger, older = sorted((best, other), key=lambda person: person[1])
        (name, age), (other_name, other_age) = writer.order(best, other)
        best = writer.result(older, younger)
        lines.append(f"{name} {age} or {other_name} {other_age} is {best[0]}")
    facts = " ".join(f"{name} is {age}." for name, age in people)
    oldest, _ = max(people, key=lambda person: person[1])
    return Problem("comparison", steps, f"{facts} Who is oldest?", oldest, "; ".join(lines), best[0])


def boolean(steps: int, writer: Writer) -> Problem:
    """An expression of `steps` operators with comparisons of digits, evaluated from left to right."""
    text, value = _operand(writer)
    written = writer.result(value, not value)
    lines = [f"{text} is {_word(written)}"]
    for step in range(steps):
        other, holds = _operand(writer)
        operator, before = writer.chooser.choice(("and", "or")), written
        combine = all if operator == "and" else any
        value = combine((value, holds))
        read = writer.result(holds, not holds)
        right = combine((before, read))
        written = writer.result(right, not right)
        text = f"{f'({text})' if step else text} {operator} {other}"
        first, second = writer.order(before, read)
        lines += [f"{other} is {_word(read)}", f"{_word(first)} {operator} {_word(second)} is {_word(written)}"]
    return Problem("boolean", steps, f"{text} = ?", _word(value), "; ".join(lines), _word(written))


def words(steps: int, writer: Writer) -> Problem:
    """`steps` changes of a number of things, among sentences about other people or other things."""
    chooser = writer.chooser
    who, other = chooser.sample(NAMES, 2)
    thing, unrelated = chooser.sample(THINGS, 2)
    count = written = chooser.randint(1, 9)
    sentences, lines = [f"{who} has {count} {thing}."], []
    for _ in range(steps):
        change = chooser.randint(1, 9)
        gain = change > min(count, written) or chooser.random() < 0.5
        sentences.append(f"{who} {chooser.choice(GAINS if gain else LOSSES)} {change} {thing}.")
        left, right = writer.order(written, change) if gain else (written, change)
        count, written = (n + change if gain else n - change for n in (count, written))
        written = writer.number(written)
        lines.append(f"{left}{'+' if gain else '-'}{right}={written}")
    distractors = ((other, thing), (other, unrelated), (who, unrelated))
    for subject, owned in chooser.sample(distractors, chooser.randint(1, 2)):
        sentences.insert(chooser.randint(1, len(sentences)), f"{subject} has {chooser.randint(1, 9)} {owned}.")
    question = f"{' '.join(sentences)} How many {thing} has {who}?"
    return Problem("words", steps, question, str(count), " ".join(lines), str(written))


KINDS: tuple[Callable[[int, Writer], Problem], ...] = (addition, comparison, boolean, words)


def problems(count: int, steps: tuple[int, ...], seed: int, part: str, errors: float = 0.0) -> list[Problem]:
    """Return `count` different problems of a part, of all kinds and numbers of steps in turn.

    errors: share of the steps of the solutions with a wrong result.
    """
    writer = Writer(seed, errors)
    found: dict[str, Problem] = {}
    turns = [(kind, number) for number in steps for kind in KINDS]
    while len(found) < count:
        kind, number = turns[len(found) % len(turns)]
        problem = kind(number, writer)
        if part_of(problem) == part:
            found.setdefault(problem.question, problem)
    return [*found.values()]


def part_of(problem: Problem) -> str:
    """The part, of PARTS, that a problem belongs to."""
    place = int.from_bytes(hashlib.sha256(problem.question.encode()).digest()[:4], "little") / 2**32
    return next(part for part, end in zip(PARTS, itertools.accumulate(SHARES), strict=True) if place < end)


def _operand(writer: Writer) -> tuple[str, bool]:
    """A comparison of two different digits, perhaps negated, and whether it holds."""
    a, b = writer.chooser.sample(range(10), 2)
    negated = writer.chooser.random() < 0.25
    return f"{'not ' * negated}{a}<{b}", (a < b) != negated


def _word(value: bool) -> str:
    return "true" if value else "false"
