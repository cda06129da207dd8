"""EleutherAI's lm-eval, on our models as transformers'."""

from fira.checkpoint.load_model import own_tokenizer
from fira.errors import UserError
from fira.huggingface.export import as_fast_tokenizer, as_transformers
from fira.models.language_model import LanguageModel


def evaluate_tasks(
    model: LanguageModel, names: list[str], folder: str | None = None, limit: int | None = None, batch_size: int = 8
) -> dict[str, dict[str, float]]:
    """The scores of each task, by metric.

    folder: where the tasks' YAML files are; None: those that come with lm-eval, whose data it fetches. limit: of
    examples. UserError where lm-eval is missing or knows no such task.
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
            f"--tasks {','.join(unknown)}: no such task; known: {', '.join(sorted(tasks.all_tasks)[:20])} …"
        )
    length = model.config.seq_len
    wrapped = HFLM(
        pretrained=as_transformers(model),
        tokenizer=as_fast_tokenizer(own_tokenizer(model), length),
        batch_size=batch_size,
        max_length=length,
    )
    found = simple_evaluate(model=wrapped, tasks=names, task_manager=tasks, limit=limit, bootstrap_iters=0)
    return {task: _scores(metrics) for task, metrics in found["results"].items()}


def _scores(metrics: dict[str, object]) -> dict[str, float]:
    """`{"acc,none": 0.5, "acc_stderr,none": "N/A", …}` → the numbers, under names without the filter "none"."""
    return {name.removesuffix(",none"): value for name, value in metrics.items() if isinstance(value, float)}
