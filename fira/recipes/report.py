"""The report of a recipe: one HTML file that needs no other file and no network."""

import os
import platform
from contextlib import suppress
from datetime import datetime
from html import escape
from importlib.metadata import version
from pathlib import Path

import torch

from fira.checkpoint.pretrained import open_saved, stored_config
from fira.errors import UserError
from fira.files import replace
from fira.metrics.baselines import read_baselines
from fira.metrics.csv_log import LOG_NAME, read_log
from fira.models.registry import build, family_of
from fira.recipes import report_figures, report_tables
from fira.recipes.recipe_file import Recipe
from fira.recipes.stage_state import read_record

REPORT = "report.html"
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1100px; margin: 2em auto; padding: 0 1em; }
h1 { margin-bottom: 0; } h2 { margin-top: 2em; border-bottom: 1px solid #ddd; } h3 { margin-bottom: .3em; }
table { border-collapse: collapse; margin: .5em 0; } th { text-align: left; font-weight: 600; }
th, td { padding: .25em .8em; border-bottom: 1px solid #eee; vertical-align: top; }
.numbers td:not(:first-child) { text-align: right; font-variant-numeric: tabular-nums; }
.numbers th:not(:first-child) { text-align: right; }
.answers { font-size: 13px; table-layout: fixed; width: 100%; } .answers td { overflow-wrap: anywhere; }
.right { color: #00704f; } .right::before { content: "✓ "; } .wrong { color: #8a4600; }
.facts { color: #555; } pre { background: #f6f6f6; padding: 1em; white-space: pre-wrap; overflow-wrap: anywhere; }
svg { max-width: 100%; height: auto; }
"""


def write_report(recipe: Recipe) -> Path:
    """Write the report of the stages that have been run, and return its path. Raises UserError if none has."""
    records = {stage.name: read_record(recipe, stage) for stage in recipe.stages}
    known = {name: entry for name, entry in records.items() if entry}
    if not known:
        raise UserError(f"{recipe.out}: no stage of the recipe has been run; run it without --report")
    runs = [(stage, recipe.output(stage.name)) for stage in recipe.stages if stage.command == "train"]
    training = [(stage, folder) for stage, folder in runs if (folder / LOG_NAME).exists()]
    logs = [read_log(folder / LOG_NAME) for _, folder in training]
    found = report_tables.evaluations(recipe)
    facts = _facts([folder for _, folder in training], max(entry.ranks for entry in known.values()))
    parts = [f"<h1>{escape(recipe.title)}</h1>", f'<p class="facts">{escape(facts)}</p>']
    if found:
        parts += ["<h2>Scores</h2>", report_tables.scores(found)]
    speeds = {stage.name: float(log["tokens_per_s"].median()) for (stage, _), log in zip(training, logs, strict=True)}
    sizes = {name: size(recipe.output(name)) for name in known}
    seconds = {name: entry.seconds for name, entry in known.items()}
    parts += ["<h2>Stages</h2>", report_tables.stages(recipe, seconds, speeds, sizes)]
    for (stage, folder), log in zip(training, logs, strict=True):
        parts += [f"<h2>Training: {escape(stage.title)}</h2>"]
        parts += [report_figures.curves(log, _baselines(folder)), report_figures.expert_load(log) or ""]
    if found:
        parts += ["<h2>Answers</h2>", report_tables.answers(found)]
    commands = "\n".join(map(recipe.command_line, recipe.stages))
    parts += ["<h2>Commands</h2>", f"<p>All stages: <code>fira recipe {escape(str(recipe.path))}</code></p>"]
    parts += [f"<pre>{escape(commands)}</pre>"]
    out = recipe.out / REPORT
    replace(out, _page(recipe.title, "\n".join(parts)).encode(errors="replace"))
    return out


def _page(title: str, body: str) -> str:
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _facts(runs: list[Path], ranks: int) -> str:
    """The model, the machine and the versions as one line."""
    parts = []
    if runs:
        config = stored_config(open_saved(runs[-1]))
        with torch.device("meta"):
            parameters = sum(weight.numel() for weight in build(config).weights().values())
        parts.append(f"{family_of(config).name}, {parameters:,} parameters")
    parts += [f"{ranks} rank{'s' if ranks > 1 else ''} on {os.cpu_count()} cores ({platform.machine()})"]
    parts += [f"Fira {version('fira')}, torch {torch.__version__}, Python {platform.python_version()}"]
    return " · ".join([*parts, datetime.now().strftime("%Y-%m-%d %H:%M")])


def _baselines(run: Path) -> dict[str, float]:
    """The losses of the n-gram models on the data of a run; empty if there are none."""
    with suppress(UserError):
        return read_baselines(run)
    return {}


def size(path: Path) -> int:
    """The bytes of a file, or of all files in a folder."""
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())
