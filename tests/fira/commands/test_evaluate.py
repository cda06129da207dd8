"""scripts/evaluate.py prints what `perplexity`, `expert_utilisation` and `EncodedTask.scores` return."""

import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
from matplotlib.image import imread
from tokenizers import Tokenizer

import fira
from fira.data.tokenizer import eos_id
from fira.evaluation.task_scores import TaskScores
from fira.generation.perplexity import TextLoss, perplexity
from tests.fira.evaluation.evaluation_examples import write_jsonl
from tests.fira.small_model import TEXT, make_model
from tests.launch import ROOT


def evaluate(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
    monkeypatch.setattr("sys.argv", ["evaluate.py", *map(str, arguments)])
    runpy.run_path(str(ROOT / "scripts" / "evaluate.py"), run_name="__main__")


def test_loss_of_each_file_and_of_all_files_and_expert_utilisation(
    run_folder: Path,
    tmp_path: Path,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "one.txt").write_text(TEXT)
    (tmp_path / "rows.csv").write_text("Text\nDie Bäume\nim Wald\n")
    evaluate(monkeypatch, "--checkpoint", run_folder, "--data", tmp_path / "one.txt")
    single = capsys.readouterr().out.splitlines()
    files = ["--data", tmp_path / "rows.csv", tmp_path / "rows.csv", "--text_column", "Text"]
    evaluate(monkeypatch, "--checkpoint", run_folder, *files)
    several = capsys.readouterr().out.splitlines()

    eos = eos_id(tokenizer)
    loss = perplexity(make_model(), [eos, *fira.encode(TEXT, tokenizer)])
    assert single[0] == f"{tmp_path / 'one.txt'}: {loss.describe(len(TEXT.encode()))}"
    model = make_model()
    model.tokenizer = tokenizer
    shares = fira.expert_utilisation(model, TEXT)
    assert single[-2:] == [
        f"  layer {layer}: " + " ".join(f"{100 * share:.1f}" for share in shares[layer]) for layer in (1, 2)
    ]
    loss = perplexity(model, [eos, *fira.encode("Die Bäume", tokenizer), eos, *fira.encode("im Wald", tokenizer)])
    size = len("Die Bäumeim Wald".encode())
    assert several[0].endswith(loss.describe(size))
    assert several[2] == f"together: {TextLoss(loss.nats, 2 * loss.tokens).describe(2 * size)}"


CHOICES = [{"query": "im", "choices": ["Wald", "Baum"], "answer": number % 2} for number in range(8)]


@pytest.mark.parametrize("place", ["run", "checkpoints", "step", "export"])
def test_tasks_in_files_are_printed_drawn_and_written(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    files = [write_jsonl(tmp_path / f"{name}.jsonl", CHOICES) for name in ("one", "two")]
    (step,) = (run_folder / "checkpoints").glob("step-*")
    checkpoint = {"run": run_folder, "checkpoints": step.parent, "step": step, "export": tmp_path / "export"}[place]
    if place == "export":
        shutil.copytree(step, checkpoint)
    arguments = ["--tasks", f"{files[0]}, {files[1]}", "--limit", "6", "--plot", tmp_path / "bars.png"]
    evaluate(monkeypatch, "--checkpoint", checkpoint, *arguments)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["task", "one", "acc_norm", "two", "acc_norm"]
    assert lines[1].split()[2:] == ["0.5000", "0.2236", "0.5000", "6", "0"]  # sqrt(0.25 / 5)
    folder = checkpoint if place == "export" else run_folder
    tasks = json.loads((folder / "evaluation.json").read_text())["tasks"]
    assert tasks["one"]["examples"] == 6
    assert tasks["two"]["scores"]["acc"]["value"] == 0.5
    assert imread(tmp_path / "bars.png").std() > 0.05
    fira.load_model(checkpoint)  # the file is no part of the checkpoint


def test_tasks_of_lm_eval_are_added_to_those_in_files(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fira.huggingface import tasks

    found = {"hellaswag": tasks.HarnessScores(9, {"acc": (0.25, 0.1), "bits_per_byte": (1.5, None)})}
    monkeypatch.setattr(tasks, "evaluate_tasks", lambda _, names, *__: {name: found[name] for name in names})
    path = write_jsonl(tmp_path / "one.jsonl", CHOICES)
    evaluate(monkeypatch, "--checkpoint", run_folder, "--tasks", f"hellaswag,{path}")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[-2:]]
    assert lines == [["hellaswag", "acc", "0.2500", "0.1000", "9", "0"], ["bits_per_byte", "1.5000", "9", "0"]]
    scores = json.loads((run_folder / "evaluation.json").read_text())["tasks"]
    assert scores["hellaswag"]["scores"]["acc"] == {"value": 0.25, "error": 0.1}
    assert list(scores) == ["one", "hellaswag"]


def test_chart_without_an_accuracy_is_refused(tmp_path: Path) -> None:
    from fira.evaluation.score_chart import plot_scores

    with pytest.raises(fira.errors.UserError, match="no task reports an accuracy"):
        plot_scores([TaskScores("words", 3, {})], "Scores", tmp_path / "bars.png")


def test_invalid_arguments_end_with_a_one_line_error(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as if it were not installed
    for message, arguments in (
        ("give --data or --tasks", []),
        ("no such file", ["--data", "nowhere.txt"]),
        ("pip install -e '.[eval]'", ["--tasks", "hellaswag"]),
        ("nowhere.jsonl: No such file", ["--tasks", "nowhere.jsonl"]),
    ):
        with pytest.raises(SystemExit) as end:
            evaluate(monkeypatch, "--checkpoint", run_folder, *arguments)
        assert end.value.code == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1


def test_quantised_model_is_compared_with_the_saved_one(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "one.txt").write_text(TEXT)
    arguments = ["--checkpoint", run_folder, "--data", tmp_path / "one.txt"]
    evaluate(monkeypatch, *arguments)
    before = float(re.search(r"perplexity ([\d.]+):", capsys.readouterr().out)[1])
    evaluate(monkeypatch, *arguments, "--quantize", "int4")
    out, err = capsys.readouterr()
    after = float(re.search(r"perplexity ([\d.]+):", out)[1])
    line = re.search(r"^perplexity, saved → int4: ([\d.]+) → ([\d.]+) \((.*)%\)$", out, re.MULTILINE)
    assert (float(line[1]), float(line[2])) == (before, after)
    assert float(line[3]) == pytest.approx(100 * (after / before - 1), abs=0.02)
    assert before != after
    assert re.search(r"^int4: weights of 0\.1 MB, in fp32 0\.1 MB \(\d+%\)$", err, re.MULTILINE)


def test_tasks_are_scored_with_a_quantised_head(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = write_jsonl(tmp_path / "choice.jsonl", CHOICES)
    evaluate(monkeypatch, "--checkpoint", run_folder, "--tasks", tasks, "--quantize", "int8+head")
    assert "choice" in capsys.readouterr().out
