"""scripts/evaluate.py prints what `perplexity` and `expert_utilisation` return."""

import runpy
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer

import fira
from fira.data.tokenizer import eos_id
from fira.generation.perplexity import TextLoss, perplexity
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


def test_invalid_arguments_end_with_a_one_line_error(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as if it were not installed
    for message, arguments in (
        ("give --data or --tasks", []),
        ("no such file", ["--data", "nowhere.txt"]),
        (r"pip install .[eval]", ["--tasks", "hellaswag"]),
    ):
        with pytest.raises(SystemExit) as end:
            evaluate(monkeypatch, "--checkpoint", run_folder, *arguments)
        assert end.value.code == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1
