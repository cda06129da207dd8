"""The losses and task scores of a model, as `fira evaluate` prints them."""

from argparse import Namespace
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from fira import encode
from fira.checkpoint.load_model import own_config, own_tokenizer
from fira.checkpoint.step_folders import run_of
from fira.commands.loading import load
from fira.data.sources import documents
from fira.data.tokenizer import eos_id
from fira.evaluation.local_model import LocalModel
from fira.evaluation.request_encoding import RequestEncoder
from fira.evaluation.score_chart import plot_scores
from fira.evaluation.task_evaluation import encode_task
from fira.evaluation.task_files import SUFFIX, read_tasks
from fira.evaluation.task_scores import RESULTS, Score, TaskScores, table, write_scores
from fira.files import errors_naming
from fira.generation.perplexity import TextLoss, perplexity
from fira.generation.utilisation import counting_experts, shares
from fira.models.language_model import LanguageModel


def report(options: Namespace) -> None:
    """Load the model of `--checkpoint`, and report its losses on `--data` and its scores in `--tasks`.

    The losses of a quantised model are compared with those of the saved one, which is loaded before it.
    """
    saved: list[TextLoss] = []
    if options.data and options.quantize:
        full = load(options.checkpoint, options.tokenizer, None, options.quiet)
        saved = [loss for loss, _ in text_losses(full, options)]
        del full
    model = load(options.checkpoint, options.tokenizer, options.quantize, options.quiet)
    texts = print_losses(model, options, saved) if options.data else {}
    results = print_task_scores(model, options) if options.tasks else []
    checkpoint = Path(options.checkpoint).resolve()
    if options.tasks or options.out:
        folder = Path(options.out) if options.out else run_of(checkpoint)
        with errors_naming(folder):
            folder.mkdir(parents=True, exist_ok=True)
        write_scores(folder / RESULTS, str(checkpoint), results, texts)
    if options.plot and results:
        plot_scores(results, f"Scores of {checkpoint.name}", Path(options.plot))


def text_losses(model: LanguageModel, options: Namespace) -> Iterator[tuple[TextLoss, int]]:
    """Compute the loss on each file; yields it with the size of the text in bytes."""
    tokenizer = own_tokenizer(model)
    for file in options.data:
        texts = list(documents(file, options.text_column))
        separator = eos_id(tokenizer)
        ids = list(chain.from_iterable([separator, *encode(text, tokenizer)] for text in texts))
        loss = perplexity(model, ids, not options.quiet, separator if options.document_mask else None)
        yield loss, sum(len(text.encode()) for text in texts)


def print_losses(model: LanguageModel, options: Namespace, saved: list[TextLoss]) -> dict[str, dict[str, float]]:
    """Print the loss on each file, the loss on all files if there are several, and the load of each expert.

    saved: losses of the saved model on the files, with which those of a quantised model are compared. Return the losses
    by file.
    """
    losses, sizes = [], []
    with counting_experts(model) as counts:
        for file, (loss, size) in zip(options.data, text_losses(model, options), strict=True):
            losses.append(loss)
            sizes.append(size)
            print(f"{file}: {loss.describe(size)}")
    if len(losses) > 1:
        print(f"together: {TextLoss.mean(losses).describe(sum(sizes))}")
    if saved:
        before, after = TextLoss.mean(saved).perplexity, TextLoss.mean(losses).perplexity
        change = f"{before:.5g} → {after:.5g} ({after / before - 1:+.2%})"
        print(f"perplexity, saved → {options.quantize}: {change}")
    if counts:
        print("tokens of each expert, in percent:")
    for layer, fractions in shares(counts).items():
        print(f"  layer {layer}: " + " ".join(f"{100 * fraction:.1f}" for fraction in fractions))
    return {
        file: {"loss": loss.nats, "bits_per_byte": loss.bits_per_byte(size), "tokens": loss.tokens}
        for file, loss, size in zip(options.data, losses, sizes, strict=True)
    }


def print_task_scores(model: LanguageModel, options: Namespace) -> list[TaskScores]:
    """Print the scores of the model in tasks, and return them."""
    results = task_scores(model, options)
    print(table(results))
    return results


def task_scores(model: LanguageModel, options: Namespace) -> list[TaskScores]:
    """The scores in all tasks, those in files first. The files are checked before the first evaluation."""
    given = [name.strip() for name in options.tasks.split(",")]
    paths = [name for name in given if name.lower().endswith(SUFFIX)]
    results = []
    if paths:
        encoder = RequestEncoder(own_tokenizer(model), own_config(model), model.config.seq_len)
        local = LocalModel(model, options.batch_size)
        tasks = [encode_task(task, encoder) for task in read_tasks(paths, options.limit)]
        results = [task.scores(local) for task in tasks]
    if names := [name for name in given if name not in paths]:
        from fira.huggingface.tasks import evaluate_tasks  # imports transformers

        for task, found in evaluate_tasks(model, names, options.tasks_path, options.limit, options.batch_size).items():
            scores = {metric: Score(*score) for metric, score in found.scores.items()}
            results.append(TaskScores(task, found.examples, scores))
    return results
