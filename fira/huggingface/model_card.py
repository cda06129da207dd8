"""The model card of an export, written from the files of its run.

A file of the run that is missing or damaged, as in the run of an earlier version, leaves its section out.
"""

import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fira.data.mixture import parse_mixture
from fira.errors import UserError
from fira.files import read_toml
from fira.json_reader import anything, integer, mapping, nullable, number, read, record
from fira.metrics.csv_log import LOG_NAME, read_log
from fira.models.language_model import LanguageModel
from fira.models.registry import to_document
from fira.nn.moe.layer import MoE

MODEL_CARD = "MODEL_CARD.md"  # file name in exports
PICTURE = "training_progress.png"
SETTINGS = (
    *("objective", "steps", "batch_size", "optimizer", "lr", "min_lr", "warmup", "lr_schedule", "weight_decay"),
    *("clip", "precision"),
)
OBJECTIVE_SETTINGS = {  # by objective, in addition to the others
    "dpo": ("dpo_loss", "dpo_beta"),
    "distill": ("distill_beta", "distill_temperature", "teacher_top_k", "on_policy"),
    "grpo": ("group_size", "answer_after", "answer_tokens"),
}
MODELS = {"init": "starts from", "teacher": "teacher"}
UNITS = {"reward_margin": "mean over pairs", "answer_tokens": "share of wrong answers"}  # by a column of the log
COUNTS = {
    "train_tokens": "training tokens",
    "val_tokens": "validation tokens",
    "train_examples": "training examples",
    "unigram": "loss of a unigram model in nats per token",
    "trigram": "loss of a trigram model in nats per token",
}
SCORES = mapping(record({"value": number()}, {"error": nullable(number())}))
EVALUATION = record({"tasks": mapping(record({"scores": SCORES}, {"examples": integer()}))})


def write_model_card(folder: Path, model: LanguageModel, name: str, run: Path, library: str = "transformers") -> None:
    """Write the card and the picture of a run to the folder of an export; see `model_card`."""
    with suppress(OSError):
        shutil.copyfile(run / PICTURE, folder / PICTURE)
    (folder / MODEL_CARD).write_text(model_card(model, name, run, library), encoding="utf-8")


def model_card(model: LanguageModel, name: str, run: Path, library: str = "transformers") -> str:
    """Return the card as Markdown, with a YAML header that the Hugging Face Hub reads.

    name: of the export. run: the folder with the files of the run, all of which may be missing. library: the library
    that loads the export, as the Hub calls it. The weights are not read: the model may be on the meta device.
    """
    config = _settings(run / "config.toml")
    settings = (*SETTINGS, *OBJECTIVE_SETTINGS.get(str(config.get("objective")), ()), "lora")
    sections = [
        _header(model, library),
        f"# {name}\n\n{_summary(model)}",
        _section("Model", _table(("option", "value"), to_document(model.config).items())),
        _section("Training data", _data(config, run / "data.json")),
        _section("Training", _table(("setting", "value"), [(key, config[key]) for key in settings if key in config])),
        _section("Results", _results(run)),
        _section("Evaluation", _evaluation(run / "evaluation.json")),
        _section("Limits", _limits(model, config)),
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def _header(model: LanguageModel, library: str) -> str:
    family = str(to_document(model.config)["family"])
    tags = dict.fromkeys(["fira", family, *(["moe"] if _moe_layers(model) else [])])
    lines = [f"library_name: {library}", "pipeline_tag: text-generation", "tags:", *(f"- {tag}" for tag in tags)]
    return "\n".join(["---", *lines, "# license: state the license of the weights here", "---"])


def _summary(model: LanguageModel) -> str:
    total, experts = model.num_parameters(), _moe_layers(model)
    inactive = sum(
        sum(p.numel() for p in moe.experts.parameters()) * (moe.num_experts - moe.router.top_k) // moe.num_experts
        for moe in experts
    )
    active = f", of which {total - inactive:,} are used for each token" if experts else ""
    with suppress(PackageNotFoundError):
        return f"A language model with {total:,} parameters{active}, trained with Fira {version('fira')}."
    return f"A language model with {total:,} parameters{active}, trained with Fira."


def _moe_layers(model: LanguageModel) -> list[MoE]:
    return [module for module in model.modules() if isinstance(module, MoE)]


def _settings(path: Path) -> Mapping[str, Any]:
    with suppress(UserError):
        return read_toml(path, str(path))
    return {}


def _data(config: Mapping[str, Any], counts: Path) -> str:
    """Names without their folders, and the counts of the corpus."""
    names: list[tuple[str, Any]] = []
    with suppress(UserError):
        sources = parse_mixture(str(config["data"])) if "data" in config else []
        names = [("source", f"{Path(str(source)).name} ({share:.0%})") for source, share in sources]
    if config and not names:
        names = [("source", "the Python standard library")]
    names += [(text, Path(str(config[key])).name) for key, text in MODELS.items() if key in config]
    summary: Mapping[str, Any] = {}
    with suppress(UserError):
        summary = read(counts, record({}, {"baselines": mapping(anything)}))
        summary = {**summary, **summary.get("baselines", {})}
    numbers = [(text, summary[key]) for key, text in COUNTS.items() if isinstance(summary.get(key), int | float)]
    return _table(("", ""), [*names, *numbers])


def _results(run: Path) -> str:
    parts = []
    with suppress(UserError):
        log = read_log(run / LOG_NAME)
        if len(log):
            last, validation = log.iloc[-1], log["val_loss"].dropna()
            rows = [("step", int(last["iter"])), ("training loss", float(last["train_loss"]))]
            if len(validation):
                rows += [("validation loss", float(validation.iloc[-1]))]
                rows += [("best validation loss", float(validation.min()))]
            if "val_reward_accuracy" in log and len(validation):
                rows += [("validation accuracy", float(log["val_reward_accuracy"].dropna().iloc[-1]))]
            unit = next((unit for column, unit in UNITS.items() if column in log), "nats per token")
            parts.append(_table(("last step", f"losses, {unit}"), rows))
    if (run / PICTURE).is_file():
        parts.append(f"![Losses, learning rate, throughput and expert load]({PICTURE})")
    return "\n\n".join(parts)


def _evaluation(path: Path) -> str:
    rows: list[Sequence[Any]] = []
    with suppress(UserError):
        for task, entry in read(path, EVALUATION)["tasks"].items():
            for metric, score in entry["scores"].items():
                error = score.get("error")
                rows.append((task, metric, score["value"], "" if error is None else error, entry.get("examples", "")))
    return _table(("task", "metric", "score", "standard error", "examples"), rows)


def _limits(model: LanguageModel, config: Mapping[str, Any]) -> str:
    lines = [
        f"- The context has {model.config.seq_len:,} tokens.",
        "- The model reproduces errors and biases of its training data, and states falsehoods in fluent text.",
    ]
    if config.get("objective", "pretrain") == "pretrain":
        lines.append("- It continues text. It has not been trained to follow instructions or to refuse harmful ones.")
    else:
        lines.append("- It has not been tested for safety. Check its answers before you rely on them.")
    return "\n".join(lines)


def _section(title: str, content: str) -> str:
    return f"## {title}\n\n{content}" if content else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table of Markdown; empty without rows."""
    lines = [[_cell(value) for value in row] for row in rows]
    rule = ["---"] * len(head)
    return "\n".join(f"| {' | '.join(line)} |" for line in [list(head), rule, *lines]) if lines else ""


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    text = f"{value:,}" if type(value) is int else str(value)
    return text.replace("|", r"\|").replace("\n", " ")
