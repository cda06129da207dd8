"""Tasks from JSONL files, one example per line, all of the same form."""

from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from fira.data.readers import read_records
from fira.errors import UserError
from fira.evaluation.task_forms import Example, parse_example

SUFFIX = ".jsonl"


class PlacedExample(NamedTuple):
    """where: file and line, for messages."""

    where: str
    example: Example


class Task(NamedTuple):
    """name: of the file without its suffix."""

    name: str
    examples: list[PlacedExample]


def read_tasks(paths: Sequence[str], limit: int | None = None) -> list[Task]:
    """Read the tasks of several files, or their first `limit` examples.

    Raises UserError, which names file and line, for a missing file and for an invalid record.
    """
    tasks = [read_task(Path(path), limit) for path in paths]
    name, count = Counter(task.name for task in tasks).most_common(1)[0]
    if count > 1:
        raise UserError(f"two tasks are named {name}; rename one of the files")
    return tasks


def read_task(path: Path, limit: int | None = None) -> Task:
    """Read the task of one file, see `read_tasks`."""
    if path.suffix.lower() != SUFFIX:
        raise UserError(f"{path}: not a file of examples; give a file *{SUFFIX}")
    records = islice(read_records(path, lambda _: None), limit)
    examples = [PlacedExample(where, parse_example(record, where)) for where, record in records]
    if not examples:
        raise UserError(f"{path}: contains no example; give a file with at least one line")
    form = type(examples[0].example)
    for where, example in examples:
        if not isinstance(example, form):
            raise UserError(f"{where}: has another form than line 1, {', '.join(form.fields)}; give a file for each")
    return Task(path.stem, examples)
