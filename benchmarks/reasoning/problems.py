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

A problem belongs to the test set by the hash of its text, so that no problem is in both sets.
"""

import hashlib
import random
from collections.abc import Callable
from typing import NamedTuple

NAMES = ("Ann", "Bob", "Eve", "Ida", "Kim", "Leo", "Max", "Sam", "Tom", "Zoe")
THINGS = ("pens", "cups", "keys", "maps", "nuts", "pins")
GAINS, LOSSES = ("buys", "finds", "gets"), ("loses", "sells", "gives away")
TEST_SHARE = 0.1


class Problem(NamedTuple):
    """The text of a problem, its solution with a number of steps, and its answer."""

    kind: str
    steps: int
    question: str
    solution: str
    answer: str

    @property
    def completion(self) -> str:
        """The text to learn: the solution, and the answer after "so"."""
        return f"{self.solution} so {self.answer}"


def addition(steps: int, chooser: random.Random) -> Problem:
    """The sum of two numbers of `steps` digits, digit by digit with carries."""
    a, b = (chooser.randrange(10 ** (steps - 1), 10**steps) for _ in range(2))
    lines, carry = [], 0
    for place in range(steps):
        digits = [a // 10**place % 10, b // 10**place % 10] + [1] * carry
        lines.append(f"{'+'.join(map(str, digits))}={sum(digits)}")
        carry = sum(digits) // 10
    return Problem("addition", steps, f"{a} + {b} = ?", " ".join(lines), str(a + b))


def comparison(steps: int, chooser: random.Random) -> Problem:
    """The oldest of `steps` + 1 people of different age, by one comparison after the other."""
    people = [*zip(chooser.sample(NAMES, steps + 1), chooser.sample(range(1, 10), steps + 1), strict=True)]
    best, lines = people[0], []
    for other in people[1:]:
        older = max(best, other, key=lambda person: person[1])
        lines.append(f"{best[0]} {best[1]} or {other[0]} {other[1]} is {older[0]}")
        best = older
    facts = " ".join(f"{name} is {age}." for name, age in people)
    return Problem("comparison", steps, f"{facts} Who is oldest?", "; ".join(lines), best[0])


def boolean(steps: int, chooser: random.Random) -> Problem:
    """An expression of `steps` operators with comparisons of digits, evaluated from left to right."""
    text, value = _operand(chooser)
    lines = [f"{text} is {_word(value)}"]
    for step in range(steps):
        other, holds = _operand(chooser)
        operator, before = chooser.choice(("and", "or")), _word(value)
        value = (value and holds) if operator == "and" else (value or holds)
        text = f"{f'({text})' if step else text} {operator} {other}"
        lines += [f"{other} is {_word(holds)}", f"{before} {operator} {_word(holds)} is {_word(value)}"]
    return Problem("boolean", steps, f"{text} = ?", "; ".join(lines), _word(value))


def words(steps: int, chooser: random.Random) -> Problem:
    """`steps` changes of a number of things, among sentences about other people or other things."""
    who, other = chooser.sample(NAMES, 2)
    thing, unrelated = chooser.sample(THINGS, 2)
    count = chooser.randint(1, 9)
    sentences, lines = [f"{who} has {count} {thing}."], []
    for _ in range(steps):
        change = chooser.randint(1, 9)
        gain = change > count or chooser.random() < 0.5
        sentences.append(f"{who} {chooser.choice(GAINS if gain else LOSSES)} {change} {thing}.")
        result = count + change if gain else count - change
        lines.append(f"{count}{'+' if gain else '-'}{change}={result}")
        count = result
    distractors = ((other, thing), (other, unrelated), (who, unrelated))
    for subject, owned in chooser.sample(distractors, chooser.randint(1, 2)):
        sentences.insert(chooser.randint(1, len(sentences)), f"{subject} has {chooser.randint(1, 9)} {owned}.")
    return Problem("words", steps, f"{' '.join(sentences)} How many {thing} has {who}?", " ".join(lines), str(count))


KINDS: tuple[Callable[[int, random.Random], Problem], ...] = (addition, comparison, boolean, words)


def problems(count: int, steps: tuple[int, ...], seed: int, test: bool) -> list[Problem]:
    """Return `count` different problems, of all kinds and numbers of steps in turn, of the test set or outside it."""
    chooser = random.Random(seed)
    found: dict[str, Problem] = {}
    turns = [(kind, number) for number in steps for kind in KINDS]
    while len(found) < count:
        kind, number = turns[len(found) % len(turns)]
        problem = kind(number, chooser)
        if is_test(problem) == test:
            found.setdefault(problem.question, problem)
    return [*found.values()]


def is_test(problem: Problem) -> bool:
    """Whether a problem belongs to the test set."""
    digest = hashlib.sha256(problem.question.encode()).digest()
    return int.from_bytes(digest[:4], "little") < TEST_SHARE * 2**32


def _operand(chooser: random.Random) -> tuple[str, bool]:
    """A comparison of two different digits, perhaps negated, and whether it holds."""
    a, b = chooser.sample(range(10), 2)
    negated = chooser.random() < 0.25
    return f"{'not ' * negated}{a}<{b}", (a < b) != negated


def _word(value: bool) -> str:
    return "true" if value else "false"
