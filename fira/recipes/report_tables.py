"""Tables of the report as HTML: scores, answers to the same questions, and times and sizes of the stages."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fira.evaluation.task_scores import PERPLEXITY, RESULTS
from fira.json_reader import anything, mapping, read, record
from fira.recipes.recipe_file import Recipe

SHOWN = 10  # answers of each task
SCHEMA = record({"tasks": mapping(anything)}, {"texts": mapping(anything)})


@dataclass(frozen=True)
class Evaluated:
    """The evaluation.json of a stage."""

    title: str
    tasks: dict[str, Any]
    texts: dict[str, Any]


def evaluations(recipe: Recipe) -> list[Evaluated]:
    """The evaluations among the stages, in their order."""
    found: list[Evaluated] = []
    for stage in recipe.stages:
        path = recipe.output(stage.name) / RESULTS
        if stage.command == "evaluate" and path.exists():
            content = read(path, SCHEMA)
            title = stage.title if stage.title not in {entry.title for entry in found} else stage.name
            found.append(Evaluated(title, content["tasks"], content.get("texts", {})))
    return found


def scores(found: Sequence[Evaluated]) -> str:
    """A row per task and metric, and per text, with a column per evaluation. The best values of a row are bold."""
    rows: dict[str, list[float | None]] = {}
    notes: dict[str, str] = {}
    for number, entry in enumerate(found):
        for task, result in entry.tasks.items():
            for metric, score in result["scores"].items():
                row = f"{task} · {metric}"
                rows.setdefault(row, [None] * len(found))[number] = score["value"]
                chance = result.get("chance") if metric.startswith("acc") else None
                notes[row] = f"{result['examples']}" + (f", chance {chance:.0%}" if chance else "")
        for file, values in entry.texts.items():
            row = f"{_short(file, found)} · bits per byte"
            rows.setdefault(row, [None] * len(found))[number] = values["bits_per_byte"]
            notes[row] = f"{values['tokens']:,} tokens"
    body = ([escape(row), *_values(row, values), notes[row]] for row, values in rows.items())
    return table(["score", *(entry.title for entry in found), "examples"], body)


def _short(file: str, found: Sequence[Evaluated]) -> str:
    """The stem of a text, or its path if another text has the same stem."""
    files = {other for entry in found for other in entry.texts}
    stems = [Path(other).stem for other in files]
    return Path(file).stem if stems.count(Path(file).stem) == 1 else file


def _values(row: str, values: Sequence[float | None]) -> list[str]:
    """The numbers of a row as HTML: shares in percent."""
    lower = row.endswith((PERPLEXITY, "bits per byte"))
    known = [value for value in values if value is not None]
    best = min(known) if lower else max(known)
    texts = ["" if value is None else f"{value:.3f}" if lower else f"{value:.1%}" for value in values]
    is_best = [value == best and min(known) != max(known) for value in values]
    return [f"<b>{text}</b>" if bold else text for text, bold in zip(texts, is_best, strict=True)]


def answers(found: Sequence[Evaluated]) -> str:
    """A table per task with generated answers: the same questions, with the answers of each evaluation."""
    names = list(
        dict.fromkeys(task for entry in found for task, result in entry.tasks.items() if result.get("answers"))
    )
    return "".join(f"<h3>{escape(name)}</h3>" + _answers(name, found) for name in names)


def _answers(task: str, found: Sequence[Evaluated]) -> str:
    """A table of the evaluations of a task, or several if other files of the same name have other questions."""
    groups: dict[str, dict[str, list[Any]]] = {}
    for entry in found:
        if answers := entry.tasks.get(task, {}).get("answers", [])[:SHOWN]:
            questions = json.dumps([answer["prompt"] for answer in answers])
            groups.setdefault(questions, {})[entry.title] = answers
    return "".join(map(_answer_table, groups.values()))


def _answer_table(by_title: Mapping[str, Sequence[Any]]) -> str:
    rows = []
    for examples in zip(*by_title.values(), strict=True):
        cells = [_marked(example["generated"], example["right"]) for example in examples]
        rows.append([escape(_question(examples[0]["prompt"])), escape(examples[0]["answer"]), *cells])
    return table(["question", "right answer", *by_title], rows, "answers")


def _question(prompt: Any) -> str:
    """The last message of a chat, or a text."""
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def _marked(answer: str, right: bool) -> str:
    kind = "right" if right else "wrong"
    return f'<span class="{kind}">{escape(answer.strip()) or "(empty)"}</span>'


def table(header: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "numbers") -> str:
    """An HTML table. header: texts. rows: HTML."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def stages(recipe: Recipe, seconds: Mapping[str, float], speeds: Mapping[str, float], sizes: Mapping[str, int]) -> str:
    """A row per stage. seconds, speeds (tokens/s), sizes (bytes): by the names of the stages that have them."""
    rows = []
    for stage in recipe.stages:
        name = stage.name
        rows.append(
            [
                escape(name),
                escape(stage.command),
                tqdm.format_interval(round(seconds[name])) if name in seconds else "",
                f"{speeds[name]:,.0f}" if name in speeds else "",
                f"{sizes[name] / 1e6:,.1f}" if name in sizes else "",
            ]
        )
    total = tqdm.format_interval(round(sum(seconds.values())))
    rows.append(["all", "", total, "", f"{sum(sizes.values()) / 1e6:,.1f}"])
    return table(["stage", "command", "time", "tokens/s", "output (MB)"], rows)
