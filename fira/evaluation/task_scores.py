"""Scores of tasks with their standard errors: as a table, and as the document evaluation.json."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from fira.data.chat_template import Message
from fira.files import replace

RESULTS = "evaluation.json"  # file name in run folders and exports
PERPLEXITY = "perplexity"
LARGEST_EXPONENT = 700  # exp of a larger number overflows


class Score(NamedTuple):
    """error: the standard error of the value; None for a single example."""

    value: float
    error: float | None


class GeneratedAnswer(NamedTuple):
    """The prompt is a text, or the messages of a chat. right: whether `generated` counts as the answer."""

    prompt: str | list[Message]
    answer: str
    generated: str
    right: bool


@dataclass(frozen=True)
class TaskScores:
    """Scores of a task by metric.

    truncated: number of requests that lost the beginning of their context. chance: the expected acc of a random
    answer; None if it is not known. answers: generated, with the prompts and the right answers.
    """

    task: str
    examples: int
    scores: dict[str, Score]
    truncated: int = 0
    chance: float | None = None
    answers: tuple[GeneratedAnswer, ...] = ()


def mean_score(values: Sequence[float]) -> Score:
    """The mean, and the standard error of the mean: √(p (1 − p) / (n − 1)) for a share p of n ones, as in lm-eval."""
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Score(mean, None)
    return Score(mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values)))


def perplexity_score(logs: Sequence[float]) -> Score:
    """exp(−mean) of log-probabilities, and its standard error to first order."""
    mean, error = mean_score(logs)
    value = math.exp(min(-mean, LARGEST_EXPONENT))
    return Score(value, None if error is None else value * error)


def summarise(examples: Sequence[Mapping[str, float]]) -> dict[str, Score]:
    """The score of each metric from those of the examples; a perplexity from their log-probabilities."""
    columns = {metric: [example[metric] for example in examples] for metric in examples[0]}
    return {
        metric: (perplexity_score if metric == PERPLEXITY else mean_score)(values) for metric, values in columns.items()
    }


def table(results: Sequence[TaskScores]) -> str:
    """The scores as lines of text."""
    rows: list[tuple[str, ...]] = [("task", "metric", "score", "error", "chance", "examples", "truncated")]
    for result in results:
        for number, (metric, score) in enumerate(result.scores.items()):
            chance = result.chance if metric.startswith("acc") else None
            counts = (f"{result.examples:,}", f"{result.truncated:,}")
            name = "" if number else result.task
            rows.append((name, metric, *map(_cell, (score.value, score.error, chance)), *counts))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}" if abs(value) < 1e5 else f"{value:.4e}"


def write_scores(
    path: Path, model: str, results: Sequence[TaskScores], texts: Mapping[str, Mapping[str, float]] | None = None
) -> None:
    """Write evaluation.json. model: the checkpoint or export that was evaluated. texts: losses by file, if any."""
    tasks = {}
    for result in results:
        entry = asdict(result)
        entry["scores"] = {metric: score._asdict() for metric, score in result.scores.items()}
        entry["answers"] = [answer._asdict() for answer in result.answers]
        if not result.answers:
            del entry["answers"]
        tasks[entry.pop("task")] = entry
    document = {"model": model, "tasks": tasks, **({"texts": texts} if texts else {})}
    replace(path, json.dumps(document, indent=1, ensure_ascii=False).encode(errors="replace") + b"\n")
