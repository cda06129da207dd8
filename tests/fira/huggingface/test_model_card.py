"""The model card of an export: from a complete run, from a run with missing files, and from damaged files."""

import json
from pathlib import Path

import pytest
import yaml

from fira.evaluation.task_scores import Score, TaskScores, write_scores
from fira.huggingface.export_model import export
from fira.huggingface.model_card import model_card
from fira.metrics.csv_log import Row, TrainingLog
from fira.training.config import TrainConfig
from tests.fira.models.small_families import MOOSHAK, make_model
from tests.fira.small_model import make_model as make_fira

PICTURE = b"\x89PNG of a run"


def write_run(run: Path) -> None:
    """Write the files of a run, apart from the checkpoints."""
    config = TrainConfig(data="/home/someone/en.txt=3,hi|text.csv=1", steps=40, lr=0.002)
    (run / "config.toml").write_text(config.to_toml())
    (run / "data.json").write_text(
        json.dumps({"train_tokens": 123456, "val_tokens": 7890, "baselines": {"unigram": 6.5}})
    )
    log = TrainingLog(run / "training_log.csv")
    for step, validation in ((1, None), (2, 2.25), (3, 2.5)):
        log.write(
            Row(iter=step, train_loss=3.0 - step / 8, val_loss=validation, lr=0.1, tokens_per_s=1.0, grad_norm=1.0)
        )
    log.close()
    (run / "training_progress.png").write_bytes(PICTURE)
    scores = {"acc": Score(0.625, 0.0125), "perplexity": Score(12.5, None)}
    write_scores(run / "evaluation.json", "run", [TaskScores("words", 1500, scores)])


def test_card_of_preference_training_has_its_loss_and_accuracy(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(TrainConfig(objective="dpo", dpo_loss="ipo", dpo_beta=0.2).to_toml())
    log = TrainingLog(tmp_path / "training_log.csv", metrics=["reward_accuracy", "reward_margin"])
    values = {"train_loss": 0.7, "lr": 0.1, "tokens_per_s": 1.0, "grad_norm": 1.0}
    for step, accuracy in ((1, 0.625), (2, 0.75)):
        metrics = {"reward_accuracy": 0.5, "reward_margin": 0.1, "val_reward_accuracy": accuracy}
        log.write(Row(iter=step, val_loss=0.6, metrics=metrics, **values))
    log.close()
    rows = rows_of(model_card(make_model(MOOSHAK), "preferred", tmp_path))
    for row in (["dpo_loss", "ipo"], ["dpo_beta", "0.2"], ["last step", "losses, mean over pairs"]):
        assert row in rows
    assert ["validation accuracy", "0.75"] in rows


def test_card_of_a_distilled_model_with_adapters_names_its_teacher_and_settings(tmp_path: Path) -> None:
    lora = "rank=2,alpha=4,targets=attention"
    config = TrainConfig(objective="distill", init="/a/base", teacher="/a/large", distill_beta=0.5, lora=lora)
    (tmp_path / "config.toml").write_text(config.to_toml())
    rows = rows_of(model_card(make_model(MOOSHAK), "student", tmp_path))
    for row in (["starts from", "base"], ["teacher", "large"], ["distill_beta", "0.5"], ["lora", lora]):
        assert row in rows
    assert not any("dpo" in cell for row in rows for cell in row)


def test_card_of_grpo_has_its_settings_and_the_unit_of_its_loss(tmp_path: Path) -> None:
    config = TrainConfig(objective="grpo", group_size=4, answer_after="so ", answer_tokens=9)
    (tmp_path / "config.toml").write_text(config.to_toml())
    log = TrainingLog(tmp_path / "training_log.csv", metrics=["entropy", "answer_tokens"])
    metrics = {"entropy": 0.5, "answer_tokens": 3.0}
    log.write(Row(iter=1, train_loss=0.7, lr=0.1, tokens_per_s=1.0, grad_norm=1.0, metrics=metrics))
    log.close()
    rows = rows_of(model_card(make_model(MOOSHAK), "solver", tmp_path))
    assert ["last step", "losses, share of wrong answers"] in rows
    for row in (["group_size", "4"], ["answer_after", "so"], ["answer_tokens", "9"]):
        assert row in rows


def header_of(card: str) -> dict[str, object]:
    empty, header, _ = card.split("---\n", 2)
    assert empty == ""
    return yaml.safe_load(header)


def rows_of(card: str) -> list[list[str]]:
    lines = (line.replace(r"\|", "¦") for line in card.splitlines() if line.startswith("| "))
    return [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines]


def test_export_contains_the_card_of_its_run(run_folder: Path, tmp_path: Path) -> None:
    write_run(run_folder)
    (step,) = (run_folder / "checkpoints").glob("step-*")
    cards = []
    for number, checkpoint in enumerate((run_folder, step)):
        folder = export(checkpoint, tmp_path / f"exported-{number}" / "small-model")
        assert (folder / "training_progress.png").read_bytes() == PICTURE
        cards.append((folder / "MODEL_CARD.md").read_text())
    assert cards[0] == cards[1]
    card = cards[0]
    assert header_of(card) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["fira", "moe"],
    }
    assert "# small-model\n" in card
    rows = rows_of(card)
    for row in (
        ["num_experts", "4"],
        ["source", "en.txt (75%)"],
        ["source", "hi¦text.csv (25%)"],
        ["training tokens", "123,456"],
        ["loss of a unigram model in nats per token", "6.5"],
        ["steps", "40"],
        ["lr", "0.002"],
        ["training loss", "2.625"],
        ["validation loss", "2.5"],
        ["best validation loss", "2.25"],
        ["words", "acc", "0.625", "0.0125", "1,500"],
        ["words", "perplexity", "12.5", "", "1,500"],
    ):
        assert row in rows, row
    assert "](training_progress.png)" in card
    assert "/home/someone" not in card


def test_numbers_of_parameters() -> None:
    model = make_fira()  # 2 of 4 experts per token
    total = sum(parameter.numel() for parameter in model.parameters())
    experts = sum(parameter.numel() for name, parameter in model.named_parameters() if ".experts." in name)
    card = model_card(model, "small", Path("nowhere"))
    assert f"{total:,} parameters, of which {total - experts // 2:,} are used for each token" in card
    dense = make_model(MOOSHAK)
    card = model_card(dense, "small", Path("nowhere"))
    assert f"A language model with {dense.num_parameters():,} parameters, trained" in card
    assert header_of(card)["tags"] == ["fira", "mooshak"]


def test_card_without_a_run_says_less(run_folder: Path, tmp_path: Path) -> None:
    card = (export(run_folder, tmp_path / "exported") / "MODEL_CARD.md").read_text()
    body = card.split("---\n", 2)[2]
    assert [line for line in body.splitlines() if line.startswith("#")] == ["# exported", "## Model", "## Limits"]
    assert "The context has 12 tokens" in card


@pytest.mark.parametrize(
    "name", ["config.toml", "data.json", "training_log.csv", "training_progress.png", "evaluation.json"]
)
@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"{}", b"[1", b'{"tasks": {"a": 3}}', b"data = [1]\ninit = 3\n"])
def test_damaged_file_leaves_a_section_out(tmp_path: Path, name: str, content: bytes) -> None:
    write_run(tmp_path)
    complete = model_card(make_fira(), "small", tmp_path)
    (tmp_path / name).write_bytes(content)
    card = model_card(make_fira(), "small", tmp_path)
    assert card.startswith("---\n")
    assert (card == complete) == (name == "training_progress.png")
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    assert model_card(make_fira(), "small", tmp_path) != complete
