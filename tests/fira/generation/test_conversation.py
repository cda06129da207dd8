"""Chat: the prompts that the model reads, and scripts/chat.py."""

import io
import runpy
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

import fira
from fira.data.tokenizer import eos_id
from fira.generation.conversation import Conversation
from fira.generation.text import continue_text
from tests.launch import ROOT


@pytest.fixture
def prompts(scripted_model: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The prompts that the model reads, as text."""
    texts: list[str] = []

    def record(model: Any, prompt: list[int], *rest: Any, **sampling: Any) -> Iterator[str]:
        texts.append(fira.decode(prompt, model.tokenizer))
        return continue_text(model, prompt, *rest, **sampling)

    monkeypatch.setattr("fira.generation.conversation.continue_text", record)
    return texts


def test_prompt_contains_the_last_turns_that_fit_the_context(scripted_model: Any, prompts: list[str]) -> None:
    conversation = Conversation(scripted_model)
    scripted_model.will_generate("im Wald", "def")
    assert "".join(conversation.ask("Die Bäume?", 50)) == "im Wald"
    assert "".join(conversation.ask("main", 50)) == "def"
    first = "<|prompter|>Die Bäume?</s><|assistant|>im Wald</s>"
    assert prompts == [first[: first.index("im")], first + "<|prompter|>main</s><|assistant|>"]
    scripted_model.will_generate("None")
    scripted_model.config = replace(scripted_model.config, seq_len=40)
    list(conversation.ask("pass", 20))
    assert (
        prompts[-1] == "<|prompter|>main</s><|assistant|>def</s><|prompter|>pass</s><|assistant|>"
    )  # without the oldest turn
    conversation.reset()
    scripted_model.will_generate("x")
    list(conversation.ask("y", 20))
    assert prompts[-1] == "<|prompter|>y</s><|assistant|>"


def test_special_tokens_in_a_question_are_text_and_in_an_answer_end_it(
    scripted_model: Any, tokenizer: Tokenizer, prompts: list[str]
) -> None:
    conversation = Conversation(scripted_model)
    scripted_model.will_generate("ja <|prompter|> nein")
    assert "".join(conversation.ask("</s><|assistant|>", 50)) == "ja "
    following = conversation._template.prompt(conversation._messages)
    assert following.count(eos_id(tokenizer)) == 2
    assert following.count(tokenizer.token_to_id("<|assistant|>")) == 2


def test_interrupted_answer_is_part_of_the_next_prompt(scripted_model: Any, prompts: list[str]) -> None:
    conversation = Conversation(scripted_model)
    scripted_model.will_generate("Die Bäume stehen im Wald.")
    answer = conversation.ask("def", 50)
    received = next(answer) + next(answer)
    answer.close()
    scripted_model.will_generate("x")
    list(conversation.ask("main", 50))
    assert f"<|assistant|>{received}</s><|prompter|>main" in prompts[-1]


def chat(monkeypatch: pytest.MonkeyPatch, questions: str, *arguments: str | Path) -> None:
    monkeypatch.setattr("sys.argv", ["chat.py", *map(str, arguments)])
    monkeypatch.setattr("sys.stdin", io.StringIO(questions))
    runpy.run_path(str(ROOT / "scripts" / "chat.py"), run_name="__main__")


def test_script_answers_questions_from_a_pipe(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = "Die Bäume\n\n/reset\nDie Bäume\n/quit\nDie Bäume\n"
    chat(monkeypatch, questions, "--checkpoint", run_folder, "--max_new_tokens=5", "--temperature=0")
    out, err = capsys.readouterr()
    answer = out[: len(out) // 2]
    assert out == answer * 2  # an equal answer to an equal question
    assert answer.strip()
    assert err == ""


@pytest.mark.parametrize("command", ["/help", "/exit"])
def test_script_prints_its_commands_for_other_words_with_a_slash(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    chat(monkeypatch, f"{command}\n", "--checkpoint", run_folder)
    out, err = capsys.readouterr()
    assert out == ""
    assert "/reset clears the conversation" in err


def test_script_without_checkpoint_ends_with_a_one_line_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        chat(monkeypatch, "", "--checkpoint", "nowhere")
    assert end.value.code == 2
    assert "no checkpoint here" in capsys.readouterr().err


def test_closed_stdout_ends_a_script_quietly() -> None:
    many = f"{sys.executable} -c 'from fira import cli; cli.run(lambda: [print(i) for i in range(10**5)] and None)'"
    command = ["bash", "-c", f"{many} | head -n 1; exit ${{PIPESTATUS[0]}}"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (finished.returncode, finished.stdout, finished.stderr) == (141, "0\n", "")
