"""Evaluate a model on tasks of lm-eval, the evaluation harness of EleutherAI."""

from dataclasses import dataclass
from typing import Any

from fira.checkpoint.load_model import own_config, own_tokenizer
from fira.errors import UserError
from fira.files import one_line
from fira.huggingface.export_model import as_fast_tokenizer, as_transformers
from fira.models.language_model import LanguageModel

BOOTSTRAPS = 1000  # samples for the standard error of a perplexity; that of an accuracy has a closed form


@dataclass(frozen=True)
class HarnessScores:
    """examples: number of examples. scores: value and standard error by metric; None: lm-eval reports no error."""

    examples: int
    scores: dict[str, tuple[float, float | None]]


def evaluate_tasks(
    model: LanguageModel, names: list[str], folder: str | None = None, limit: int | None = None, batch_size: int = 8
) -> dict[str, HarnessScores]:
    """Evaluate a model on tasks. Return the scores by task.

    names: tasks to evaluate. folder: folder of the tasks' YAML files; None: the tasks included in lm-eval, whose data
    it downloads. limit: maximum number of examples per task.

    Raises UserError if lm-eval is not installed, a task does not exist, or its dataset cannot be loaded.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UserError("--tasks needs EleutherAI's lm-eval; pip install -e '.[eval]'") from None
    tasks = TaskManager(include_path=folder, include_defaults=folder is None)
    if unknown := sorted(set(names) - set(tasks.all_tasks)):
        raise UserError(
            f"--tasks {','.join(unknown)}: no such task; available: {', '.join(sorted(tasks.all_tasks)[:20])} …"
        )
    for name in names:
        _load_dataset(tasks, name)
    length = model.config.seq_len
    wrapped = HFLM(
        pretrained=as_transformers(model),
        tokenizer=as_fast_tokenizer(own_tokenizer(model), own_config(model), length),
        batch_size=batch_size,
        max_length=length,
    )
    evaluated = simple_evaluate(
        model=wrapped, tasks=names, task_manager=tasks, limit=limit, bootstrap_iters=BOOTSTRAPS, log_samples=False
    )
    return {
        task: HarnessScores(_examples(evaluated, task), _scores(metrics))
        for task, metrics in evaluated["results"].items()
    }


def _load_dataset(tasks: Any, name: str) -> None:
    """Load the dataset of a task into the cache. Raises UserError if it is not available, as without internet."""
    try:
        tasks.load(name)
    except Exception as error:  # of datasets, huggingface_hub, and the HTTP library that they use
        raise UserError(
            f"--tasks {name}: its dataset cannot be loaded ({one_line(error)}); connect to the internet, put it into "
            "the cache of datasets (HF_HOME), or give a JSONL file of examples"
        ) from None


def _examples(evaluated: dict[str, Any], task: str) -> int:
    """The number of examples of a task, or of all tasks of a group."""
    if task in evaluated["n-samples"]:
        return int(evaluated["n-samples"][task]["effective"])
    return sum(_examples(evaluated, part) for part in evaluated["group_subtasks"].get(task, []))


def _scores(metrics: dict[str, Any]) -> dict[str, tuple[float, float | None]]:
    """Value and error by metric: `{"acc,none": 0.5, "acc_stderr,none": "N/A"}` → `{"acc": (0.5, None)}`."""
    found = {}
    for name, value in metrics.items():
        metric, _, filtered = name.partition(",")
        if isinstance(value, float) and not metric.endswith("_stderr"):
            error = metrics.get(f"{metric}_stderr,{filtered}")
            found[name.removesuffix(",none")] = (value, error if isinstance(error, float) else None)
    return found
