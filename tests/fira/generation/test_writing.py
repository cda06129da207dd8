"""Text from a model: characters and stop texts, several prompts, utilisation, conversations."""

import io
import runpy
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

import fira
from fira import evaluate_perplexity, expert_utilisation, sample_text
from fira.data.tokenizer import eos_id, train_tokenizer
from fira.errors import UserError
from fira.generation.chat import Conversation
from fira.generation.perplexity import perplexity
from fira.generation.text import TextStream, continue_text
from fira.nn.moe.layer import MoE
from tests.fira.generation.test_generation import CONFIG, TEXT, make_model, save
from tests.launch import ROOT


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([TEXT, "def main() -> None:\n    pass\n"], 300)


@pytest.fixture
def model(tokenizer: Tokenizer) -> Any:
    model = make_model(replace(CONFIG, seq_len=200))
    model.tokenizer = tokenizer
    return model


@pytest.fixture
def dictated(model: Any, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The model, whose tokens are those of the texts it is told to write; and a list of the prompts it was given."""
    given: list[int] = []
    monkeypatch.setattr("fira.decoding.decoding.draw", lambda *_: torch.tensor([given.pop(0)]))
    model.told = lambda *texts: given.extend(
        token for text in texts for token in [*fira.encode(text, tokenizer), eos_id(tokenizer)]
    )
    return model


def test_text_comes_in_whole_characters(dictated: Any, tokenizer: Tokenizer) -> None:
    ids = fira.encode(TEXT, tokenizer)
    dictated.told(TEXT)
    pieces = list(continue_text(dictated, ids[:20], 1000))
    assert len(pieces) == len(ids) > len(list(filter(None, pieces)))  # some characters took several tokens
    assert "".join(pieces) == TEXT
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (["im Wald"], "Die Bäume stehen "),
        (["Wald", "stehen"], "Die Bäume "),
        (["fehlt", ""], TEXT),
        (["🙂"], TEXT[: TEXT.index("🙂")]),
        (["im Walde", "Wald. न"], "Die Bäume stehen im "),
        (["🙂 Ende"], TEXT),
    ],
)
def test_writing_ends_before_a_stop_text(dictated: Any, stop: list[str], expected: str) -> None:
    """It is never shown in part, nor is what only looks like its beginning lost."""
    dictated.told(TEXT)
    pieces = list(continue_text(dictated, [5], 1000, stop))
    assert "".join(pieces) == expected
    for end in range(len(pieces)):
        assert expected.startswith("".join(pieces[:end]))


def test_a_stream_holds_back_only_what_may_become_a_stop_text(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, [], ["abcd"])
    pieces = [stream.add(token) for text in ("xab", "c", "e", "ab") for token in fira.encode(text, tokenizer)]
    assert "".join(pieces) == "xabce"
    assert (stream.held, stream.ended) == ("ab", False)


def test_several_prompts_are_written_together_as_alone(model: Any) -> None:
    prompts = ["def", "Die Bäume stehen", ""]
    together = sample_text(model, prompts, 12, temperature=1.0, seed=3)
    assert together == [sample_text(model, prompt, 12, temperature=1.0, seed=3 + i) for i, prompt in enumerate(prompts)]
    assert all(text.startswith(prompt) for text, prompt in zip(together, prompts, strict=True))
    whole = sample_text(model, "def", 12, temperature=0)
    stop = whole[7]
    assert sample_text(model, "def", 12, temperature=0, stop=[stop]) == "def" + whole[3:].split(stop)[0]


def test_what_blues_documents(model: Any, tokenizer: Tokenizer) -> None:
    ids = [eos_id(tokenizer), *fira.encode(TEXT, tokenizer)]
    assert evaluate_perplexity(model, TEXT) == perplexity(model, ids).perplexity
    model.tokenizer = None
    with pytest.raises(UserError, match="without a tokenizer"):
        sample_text(model, "def")


def test_utilisation_is_the_share_of_tokens(model: Any, tokenizer: Tokenizer) -> None:
    """One window: each layer's choices, from its inputs and its router's weights."""
    text = "def main"
    ids = [eos_id(tokenizer), *fira.encode(text, tokenizer)][:-1]
    expected, hooks = {}, []
    for moe in (module for module in model.modules() if isinstance(module, MoE)):

        def note(module: Any, inputs: Any, _output: Any, index: int = moe.index) -> None:
            logits = inputs[0] @ module.gate.weight.T + module.gate.bias
            chosen = logits.topk(2).indices
            expected[index] = [float((chosen == e).sum()) / chosen.numel() for e in range(4)]

        hooks.append(moe.router.register_forward_hook(note))
    model(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    got = expert_utilisation(model, text)
    assert got.keys() == expected.keys() == {1, 2}
    for layer in got:
        assert got[layer] == pytest.approx(expected[layer])
    assert not model.layers[1].moe.router._forward_hooks


# Conversations


@pytest.fixture
def heard(dictated: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The prompts of a conversation, as text."""
    prompts: list[str] = []

    def listen(model: Any, prompt: list[int], *rest: Any, **sampling: Any) -> Iterator[str]:
        prompts.append(fira.decode(prompt, model.tokenizer))
        return continue_text(model, prompt, *rest, **sampling)

    monkeypatch.setattr("fira.generation.chat.continue_text", listen)
    return prompts


def test_a_conversation_is_remembered_within_the_context(dictated: Any, heard: list[str]) -> None:
    conversation = Conversation(dictated)
    dictated.told("im Wald", "def")
    assert "".join(conversation.ask("Die Bäume?", 50)) == "im Wald"
    assert "".join(conversation.ask("main", 50)) == "def"
    first = "<|prompter|>Die Bäume?</s><|assistant|>im Wald</s>"
    assert heard == [first[: first.index("im")], first + "<|prompter|>main</s><|assistant|>"]
    dictated.told("None")
    dictated.config = replace(dictated.config, seq_len=40)
    list(conversation.ask("pass", 20))
    assert (
        heard[-1] == "<|prompter|>main</s><|assistant|>def</s><|prompter|>pass</s><|assistant|>"
    )  # the oldest is gone
    conversation.reset()
    dictated.told("x")
    list(conversation.ask("y", 20))
    assert heard[-1] == "<|prompter|>y</s><|assistant|>"


def test_who_types_a_mark_has_not_ended_a_turn_and_no_one_speaks_for_the_prompter(
    dictated: Any, tokenizer: Tokenizer, heard: list[str]
) -> None:
    conversation = Conversation(dictated)
    dictated.told("ja <|prompter|> nein")
    assert "".join(conversation.ask("</s><|assistant|>", 50)) == "ja "
    (turn,) = conversation._turns
    assert turn.count(eos_id(tokenizer)) == 2
    assert turn.count(tokenizer.token_to_id("<|assistant|>")) == 1


def test_an_answer_that_is_stopped_is_remembered_as_far_as_it_was_heard(dictated: Any, heard: list[str]) -> None:
    conversation = Conversation(dictated)
    dictated.told("Die Bäume stehen im Wald.")
    answer = conversation.ask("def", 50)
    said = next(answer) + next(answer)
    answer.close()
    dictated.told("x")
    list(conversation.ask("main", 50))
    assert f"<|assistant|>{said}</s><|prompter|>main" in heard[-1]


def chat(monkeypatch: pytest.MonkeyPatch, questions: str, *arguments: str | Path) -> None:
    monkeypatch.setattr("sys.argv", ["chat.py", *map(str, arguments)])
    monkeypatch.setattr("sys.stdin", io.StringIO(questions))
    runpy.run_path(str(ROOT / "scripts" / "chat.py"), run_name="__main__")


def test_the_script_talks_through_a_pipe(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "run", make_model(), {"tokenizer.json": tokenizer.to_str().encode()})
    questions = "Die Bäume\n\n/reset\nDie Bäume\n/quit\nDie Bäume\n"
    chat(monkeypatch, questions, "--checkpoint", tmp_path / "run", "--max_new_tokens=5", "--temperature=0")
    out, err = capsys.readouterr()
    answer = out[: len(out) // 2]
    assert out == answer * 2  # the same to the same question
    assert answer.strip()
    assert err == ""


def test_the_script_needs_a_model(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        chat(monkeypatch, "", "--checkpoint", "nowhere")
    assert end.value.code == 2
    assert "no checkpoint here" in capsys.readouterr().err


def test_a_reader_who_has_seen_enough_is_no_error() -> None:
    many = f"{sys.executable} -c 'from fira import cli; cli.run(lambda: [print(i) for i in range(10**5)] and None)'"
    command = ["bash", "-c", f"{many} | head -n 1; exit ${{PIPESTATUS[0]}}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (141, "0\n", "")
