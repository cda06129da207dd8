"""Evaluate a model on tasks of lm-eval, the evaluation harness of EleutherAI."""

from fira.checkpoint.load_model import own_config, own_tokenizer
from fira.errors import UserError
from fira.huggingface.export_model import as_fast_tokenizer, as_transformers
from fira.models.language_model import LanguageModel


def evaluate_tasks(
    model: LanguageModel, names: list[str], folder: str | None = None, limit: int | None = None, batch_size: int = 8
) -> dict[str, dict[str, float]]:
    """Evaluate a model on tasks. Return the scores by task and metric.

    names: tasks to evaluate. folder: folder of the tasks' YAML files; None: the tasks included in lm-eval, whose data
    it downloads. limit: maximum number of examples per task.

    Raises UserError if lm-eval is not installed or a task does not exist.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UserError("--tasks needs EleutherAI's lm-eval; pip install .[eval]") from None
    tasks = TaskManager(include_path=folder, include_defaults=folder is None)
    if unknown := sorted(set(names) - set(tasks.all_tasks)):
        raise UserError(
            f"--tasks {','.join(unknown)}: no such task; available: {', '.join(sorted(tasks.all_tasks)[:20])} …"
        )
    length = model.config.seq_len
    wrapped = HFLM(
        pretrained=as_transformers(model),
        tokenizer=as_fast_tokenizer(own_tokenizer(model), own_config(model), length),
        batch_size=batch_size,
        max_length=length,
    )
    evaluated = simple_evaluate(model=wrapped, tasks=names, task_manager=tasks, limit=limit, bootstrap_iters=0)
    return {task: _scores(metrics) for task, metrics in evaluated["results"].items()}


def _scores(metrics: dict[str, object]) -> dict[str, float]:
    """Numeric scores by metric: `{"acc,none": 0.5, "acc_stderr,none": "N/A"}` → `{"acc": 0.5}`."""
    return {name.removesuffix(",none"): value for name, value in metrics.items() if isinstance(value, float)}
