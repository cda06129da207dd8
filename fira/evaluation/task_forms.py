"""Forms of evaluation examples: the requests that each makes to a model, and its scores.

| form            | fields of a record          | context                | continuation  | scores          |
|-----------------|-----------------------------|------------------------|---------------|-----------------|
| multiple choice | query, choices, answer      | the query              | each choice   | acc, acc_norm   |
| minimal pair    | sentence_good, sentence_bad | none                   | each sentence | acc             |
| last word       | text                        | all words but the last | the last word | acc, perplexity |
| exact answer    | prompt, answer              | the prompt             | generated     | exact_match     |

A continuation begins with a space. Requests and scores are those of lm-eval 0.4 for tasks of these forms, such as
HellaSwag, BLiMP and LAMBADA; acc_norm compares log-probabilities per character. A query or a prompt may also be a list
of messages: the context is then a chat, and the continuation an answer, which does not begin with a space.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np

from fira.data.chat_template import Message
from fira.data.readers import Record, valid_text
from fira.errors import UserError
from fira.posttraining.chat_records import to_messages
from fira.posttraining.exact_answer import final_answer

MAX_TOKENS = 64  # of a generated answer, unless the record says otherwise

Question = str | list[Message]  # a text, or the messages of a chat, which the model answers


class Request(NamedTuple):
    """A text whose probability after another text, or after the messages of a chat, is asked for."""

    context: Question
    continuation: str


class Likelihood(NamedTuple):
    """The answer to a request.

    log_probability: of the continuation, summed over its tokens, in nats. greedy: whether each of its tokens has the
    largest logit.
    """

    log_probability: float
    greedy: bool


@dataclass(frozen=True)
class MultipleChoice:
    """A question with several answers. answer: the number of the correct one, from 0."""

    fields: ClassVar[tuple[str, ...]] = ("query", "choices", "answer")
    query: Question
    choices: tuple[str, ...]
    answer: int

    @classmethod
    def parse(cls, record: Record, where: str) -> Self:
        choices, answer = record["choices"], record["answer"]
        if not isinstance(choices, list) or len(choices) < 2:
            raise UserError(f"{where}: choices is not a list of at least two texts; correct the record")
        texts = tuple(_text(choice, f"choice {number}", where) for number, choice in enumerate(choices))
        if type(answer) is not int or not 0 <= answer < len(texts):
            raise UserError(f"{where}: answer is {answer!r:.40}, not the number of a choice, 0 to {len(texts) - 1}")
        return cls(_question(record["query"], "query", where, empty=True), texts, answer)

    @property
    def chance(self) -> float:
        return 1 / len(self.choices)

    def requests(self) -> list[Request]:
        space = " " if isinstance(self.query, str) else ""
        return [Request(self.query, space + choice) for choice in self.choices]

    def scores(self, answers: Sequence[Likelihood]) -> dict[str, float]:
        logs = np.array([answer.log_probability for answer in answers])
        per_character = logs / [len(choice) for choice in self.choices]
        return {
            "acc": float(logs.argmax() == self.answer),
            "acc_norm": float(per_character.argmax() == self.answer),
        }


@dataclass(frozen=True)
class MinimalPair:
    """Two sentences of which one is acceptable, as in BLiMP."""

    fields: ClassVar[tuple[str, ...]] = ("sentence_good", "sentence_bad")
    chance: ClassVar[float] = 0.5
    good: str
    bad: str

    @classmethod
    def parse(cls, record: Record, where: str) -> Self:
        return cls(*(_text(record[name], name, where) for name in cls.fields))

    def requests(self) -> list[Request]:
        return [Request("", f" {self.good}"), Request("", f" {self.bad}")]

    def scores(self, answers: Sequence[Likelihood]) -> dict[str, float]:
        good, bad = answers
        return {"acc": float(good.log_probability >= bad.log_probability)}


@dataclass(frozen=True)
class LastWord:
    """A text whose last word, after its last space, is predicted, as in LAMBADA."""

    fields: ClassVar[tuple[str, ...]] = ("text",)
    chance: ClassVar[float] = 0.0
    text: str

    @classmethod
    def parse(cls, record: Record, where: str) -> Self:
        text = _text(record["text"], "text", where)
        if not text.rpartition(" ")[2].strip():
            raise UserError(f"{where}: text ends with a space, without a last word; correct the record")
        return cls(text)

    def requests(self) -> list[Request]:
        context, _, word = self.text.rpartition(" ")
        return [Request(context, f" {word}")]

    def scores(self, answers: Sequence[Likelihood]) -> dict[str, float]:
        (answer,) = answers
        return {"acc": float(answer.greedy), "perplexity": answer.log_probability}


@dataclass(frozen=True)
class ExactAnswer:
    """A prompt whose greedy continuation is compared with a text, apart from spaces around both.

    stop: texts before which the continuation ends, by default a line break; an answer to messages ends with its turn.
    max_tokens: of the continuation. after: only what follows the last occurrence of this text is compared.
    """

    fields: ClassVar[tuple[str, ...]] = ("prompt", "answer")
    prompt: Question
    answer: str
    stop: tuple[str, ...]
    max_tokens: int
    after: str | None = None

    @classmethod
    def parse(cls, record: Record, where: str) -> Self:
        prompt = _question(record["prompt"], "prompt", where)
        default: Any = "\n" if isinstance(prompt, str) else []
        stop, max_tokens = record.get("stop", default), record.get("max_tokens", MAX_TOKENS)
        texts = [stop] if isinstance(stop, str) else stop
        if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
            raise UserError(f"{where}: stop is neither a text nor a list of texts; correct the record")
        if type(max_tokens) is not int or max_tokens < 1:
            raise UserError(f"{where}: max_tokens is {max_tokens!r:.40}, not a number of at least 1")
        after = None if record.get("after") is None else _text(record["after"], "after", where)
        text = _text(record["answer"], "answer", where)
        answer = final_answer(text, after)  # None: the record has the answer without a solution
        if answer == "":
            raise UserError(f"{where}: answer is empty after {after!r:.40}; correct the record")
        return cls(prompt, text.strip() if answer is None else answer, tuple(texts), max_tokens, after)

    def scores(self, generated: str) -> dict[str, float]:
        return {"exact_match": float(final_answer(generated, self.after) == self.answer)}


LikelihoodExample = MultipleChoice | MinimalPair | LastWord
Example = LikelihoodExample | ExactAnswer
FORMS: tuple[type[Example], ...] = (MultipleChoice, MinimalPair, LastWord, ExactAnswer)


def parse_example(record: Record, where: str) -> Example:
    """Return a record as an example of the first form whose fields it has. where: its place, for messages.

    Raises UserError if it has the fields of no form, or if one of them is invalid.
    """
    for form in FORMS:
        if set(form.fields) <= record.keys():
            return form.parse(record, where)
    present = ", ".join(map(repr, record)) or "no fields"
    forms = "; ".join(", ".join(form.fields) for form in FORMS)
    raise UserError(f"{where}: has {present:.200}; give the fields of one form: {forms}")


def _question(value: Any, name: str, where: str, empty: bool = False) -> Question:
    if not isinstance(value, list):
        return _text(value, name, where, empty)
    messages = to_messages(value, "", f"{where}: {name}")
    if messages[-1]["role"] == "assistant":
        raise UserError(f"{where}: {name} ends with an answer; end it with the message that the model answers")
    return messages


def _text(value: Any, name: str, where: str, empty: bool = False) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: {name} is {type(value).__name__}, not text; correct the record")
    if not value.strip() and not empty:
        raise UserError(f"{where}: {name} is empty; correct or remove the record")
    return valid_text(value)
