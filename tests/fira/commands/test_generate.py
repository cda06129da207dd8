"""scripts/generate.py: continuation, evaluation, and one-line errors."""

import io
import re
import runpy
from pathlib import Path

import pytest
from tokenizers import Tokenizer

import fira
from fira import load_model, sample_text
from fira.data.tokenizer import eos_id
from fira.generation.perplexity import perplexity
from tests.fira.small_model import CONFIG, TEXT, make_model, save
from tests.launch import ROOT


def generate(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
    monkeypatch.setattr("sys.argv", ["generate.py", *map(str, arguments)])
    runpy.run_path(str(ROOT / "scripts" / "generate.py"), run_name="__main__")


def test_script_continues_a_prompt(
    run_folder: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = "def main() " * 9  # longer than the context
    ids = fira.encode(prompt, tokenizer)
    assert len(ids) > CONFIG.seq_len
    settings = {"temperature": 1.1, "top_k": 50, "top_p": 0.95, "seed": 5}
    (generated,) = make_model().generate([ids], 8, eos=eos_id(tokenizer), **settings)
    flags = [f"--{name}={value}" for name, value in settings.items()]
    for length in ("--max_new_tokens=8", "--max_length=8", "--max_num_tokens=8"):
        generate(monkeypatch, "--checkpoint", run_folder, "--prompt", prompt, length, *flags)
        out, err = capsys.readouterr()
        assert out.startswith(prompt)
        assert out.rstrip("\n") == fira.decode(generated, tokenizer).removesuffix("</s>").rstrip("\ufffd\n")
        assert err.startswith(f"{len(generated) - len(ids)} tokens, ")
        assert len(generated) - len(ids) != len(fira.encode(out.removeprefix(prompt).rstrip("\n"), tokenizer))


def test_model_name_refers_to_a_folder_in_out_and_prints_a_report(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The name has an extension or none, and the prompt is read from standard input."""
    run_folder.parent.joinpath("out").mkdir()
    run_folder.rename(run_folder.parent / "out" / "my")
    monkeypatch.chdir(run_folder.parent)
    outputs = []
    for name in ("my", "my.pth"):
        monkeypatch.setattr("sys.stdin", io.StringIO("def main"))
        generate(monkeypatch, "--prompt", "-", "--max_num_tokens", "8", "--model_name", name, "--temperature=0")
        outputs.append(capsys.readouterr().out)
    text = sample_text(load_model("out/my"), "def main", 8, temperature=0)
    start = f"Prompt: def main\n\nGenerated text: {text}\n\nGenerated text length: {len(text)} | Inference time: "
    assert all(output.startswith(start) for output in outputs)
    assert re.search(r"Inference time: \d+\.\d\d seconds\n$", outputs[0])


def test_chat_formats_the_prompt_as_a_message(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = []
    for prompt in (["--prompt", "<|prompter|>def main</s><|assistant|>"], ["--chat", "--prompt", "def main"]):
        generate(monkeypatch, "--checkpoint", run_folder, *prompt, "--temperature=0", "--max-new-tokens=5")
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == "<|prompter|>def main</s><|assistant|>" + outputs[1]
    assert outputs[1].strip()


def test_script_evaluates_a_text_or_a_file(
    run_folder: Path,
    tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    loss = perplexity(make_model(), [eos_id(tokenizer), *fira.encode(TEXT, tokenizer)])
    for text in (TEXT, file):
        generate(monkeypatch, "--checkpoint", run_folder, "--eval_text", text)
        out = capsys.readouterr().out
        assert f"perplexity {loss.perplexity:.5g}: {loss.nats:.4f} nats per token" in out
        assert f"{loss.bits_per_byte(len(TEXT.encode())):.4f} bits per byte" in out
        assert out.count("\n") == 1


def test_script_requires_a_tokenizer(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = save(tmp_path / "shards", make_model(), {})
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    generate(
        monkeypatch, "--checkpoint", step, "--tokenizer", tmp_path / "tokenizer.json", "--prompt", "def", "--seed=1"
    )
    assert capsys.readouterr().out.startswith("def")
    assert_error(monkeypatch, capsys, "--tokenizer", "--checkpoint", step, "--prompt", "def")


def assert_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], message: str, *arguments: str | Path
) -> None:
    """The script ends with exit status 2 and a one-line error that contains `message`."""
    with pytest.raises(SystemExit) as end:
        generate(monkeypatch, *arguments)
    out, err = capsys.readouterr()
    assert end.value.code == 2
    assert out == ""
    assert message in err
    assert err.count("\n") == 1
    assert "Traceback" not in err


def test_invalid_arguments_end_with_a_one_line_error(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "binary").write_bytes(bytes(range(128, 256)))
    for message, arguments in (
        ("no checkpoint here", ["--checkpoint", tmp_path / "missing"]),
        ("--top-k: give an integer of at least 1, not '0'", ["--checkpoint", run_folder, "--top-k=0"]),
        ("temperature", ["--checkpoint", run_folder, "--temperature=-1"]),
        ("--seed: give an integer from 0", ["--checkpoint", run_folder, "--seed=x"]),
        ("unrecognized arguments: --wrong", ["--checkpoint", run_folder, "--wrong"]),
        ("not allowed with", ["--checkpoint", run_folder, "--model_name=run"]),
        (
            "tokens: give an integer of at least 1",
            ["--checkpoint", run_folder, "--prompt=def main", "--max_length=0"],
        ),
        ("--min-p: give a number from 0 to 1, not '2'", ["--checkpoint", run_folder, "--min_p=2"]),
        ("neither a folder nor a file", ["--model_name", "run"]),
        ("UTF-8", ["--checkpoint", run_folder, "--eval-text", tmp_path / "binary"]),
        ("nothing to predict", ["--checkpoint", run_folder, "--eval-text", ""]),
    ):
        assert_error(monkeypatch, capsys, message, *arguments)


def test_quantised_model_with_a_draft_continues_a_prompt(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = sample_text(load_model(run_folder, quantize="int4+head"), "def main", 3, temperature=0)
    flags = ["--checkpoint", run_folder, "--prompt", "def main", "--max-new-tokens", "3", "--temperature", "0"]
    generate(monkeypatch, *flags, "--quantize", "int4+head", "--draft", run_folder)
    out, err = capsys.readouterr()
    assert out.rstrip("\n") == text.rstrip("\n")
    assert err.count("int4+head: weights of ") == 2
