"""Generation, perplexity, loading and scripts/generate.py."""

import io
import math
import re
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

import fira
from fira import FIRA, load_model, sample_text
from fira.checkpoint import shards as checkpoint
from fira.checkpoint.shards import TensorShard
from fira.data.prepare import Corpus, prepare
from fira.data.tokenizer import eos_id, train_tokenizer
from fira.errors import UserError
from fira.generation.perplexity import perplexity
from fira.generation.text import _default_tokenizer
from fira.models.fira import FiraConfig
from fira.models.registry import to_document
from fira.nn.context import Context, DecodingContext
from fira.nn.kv_cache import KVCache
from tests.launch import ROOT

CONFIG = FiraConfig(vocab_size=300, seq_len=12, d_model=16, n_head=2, num_layers=2, d_ff=24, dropout=0.1)
TEXT = "Die Bäume stehen im Wald. नमस्ते दुनिया! 🙂 " * 4


def make_model(config: FiraConfig = CONFIG) -> FIRA:
    """Weights of a size that makes the next token depend much on those before."""
    torch.manual_seed(1)
    model = FIRA(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([TEXT, "def main() -> None:\n    pass\n"], 300)


@pytest.fixture
def run_folder(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    """A run folder as training leaves it, with a checkpoint of `make_model()`."""
    save(tmp_path / "run", make_model(), {"tokenizer.json": tokenizer.to_str().encode()})
    return tmp_path / "run"


def save(folder: Path, model: FIRA, files: dict[str, bytes], document: dict | None = None) -> Path:
    weights = [TensorShard(name, p.detach(), 0, tuple(p.shape)) for name, p in model.named_parameters()]
    documents = {"config": document or to_document(model.config)}
    return checkpoint.save(folder / "checkpoints", 7, weights, [], documents, files, {"pp": 1, "dp": 1, "ep": 1})


# Tokens after tokens


def next_by_hand(model: FIRA, tokens: list[int]) -> int:
    """The likeliest token after the last ones that fit the context, from scratch."""
    return int(model(torch.tensor([tokens[-CONFIG.seq_len :]]))[0, -1].argmax())


@pytest.mark.parametrize("prompt", [[5], [1, 2, 3], list(range(12)), list(range(30))])
def test_greedy_generation_equals_one_forward_per_token(prompt: list[int]) -> None:
    """Also past the end of the context, and for prompts longer than it."""
    model, expected = make_model(), list(prompt)
    for _ in range(20):
        expected.append(next_by_hand(model, expected))
    assert model.generate(prompt, 20, temperature=0) == expected
    assert len(set(expected[len(prompt) :])) > 3  # no constant


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 1.3, "top_k": 20, "top_p": 0.9}])
def test_generation_is_the_same_without_the_cache(sampling: dict[str, float]) -> None:
    model = make_model()
    prompts = torch.randint(300, (2, 4), generator=torch.Generator().manual_seed(1))
    cached, plain = (
        model.generate(prompts, 25, seed=3, use_cache=use_cache, **sampling) for use_cache in (True, False)
    )
    assert cached.shape == (2, 29)
    assert torch.equal(cached, plain)
    assert torch.equal(cached[:, :4], prompts)
    assert not torch.equal(cached[0, 4:], cached[1, 4:])


def test_the_cache_saves_work() -> None:
    """Until the context is full each forward has one token; the prompt is read once."""
    model, widths, logits = make_model(), [], []
    model.layers[1].register_forward_hook(lambda _module, inputs, _output: widths.append(inputs[0].shape[1]))
    model.layers[-1].register_forward_hook(lambda _module, _inputs, output: logits.append(output.shape[1]))
    model.generate([1, 2, 3], 12, temperature=0)
    assert widths == [3, *[1] * 9, 12, 12]
    assert set(logits) == {1}


@pytest.mark.parametrize("pieces", [[12], [1, 11], [3, 4, 5], [11, 1]])
def test_the_cache_takes_any_number_of_tokens(pieces: list[int]) -> None:
    model = make_model().double()
    tokens = torch.randint(300, (2, 12), generator=torch.Generator().manual_seed(1))
    context = Context(decoding=DecodingContext(KVCache()))
    logits = torch.cat([model(some, context) for some in tokens.split(pieces, 1)], 1)
    torch.testing.assert_close(logits, model(tokens), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="context is 12"):
        model(tokens[:, :1], context)


def test_a_seed_fixes_what_is_sampled() -> None:
    model = make_model()
    first, again, other = (model.generate([1], 30, seed=seed) for seed in (1, 1, 2))
    assert first == again != other


def test_what_comes_back_is_what_was_given() -> None:
    model = make_model()
    listed = model.generate([1, 2], 3, temperature=0)
    assert isinstance(listed, list)
    row = model.generate(torch.tensor([1, 2]), 3, temperature=0)
    assert isinstance(row, Tensor)
    assert row.tolist() == listed
    assert model.generate([[1, 2], [1, 2]], 3, temperature=0) == [listed, listed]
    assert model.generate([1, 2], 0) == [1, 2]


def test_generation_has_no_dropout_and_leaves_the_mode_alone() -> None:
    model = make_model(replace(CONFIG, dropout=0.9))
    expected = model.generate([4], 10, temperature=0)
    assert model.train().generate([4], 10, temperature=0) == expected
    assert model.training
    assert not model(torch.tensor([[4]])).isnan().any()  # gradients are as before, too
    assert model(torch.tensor([[4]])).requires_grad


def test_generation_ends_with_eos() -> None:
    model = make_model()
    free = model.generate([[4], [9]], 10, temperature=0)
    eos = next(token for token in free[0][2:] if token not in free[1])
    end = free[0].index(eos) + 1
    assert 2 < end < 11
    assert model.generate([[4], [9]], 10, temperature=0, eos=eos) == [free[0][:end], free[1]]  # the other one goes on
    filled = model.generate(torch.tensor([[4], [9]]), 10, temperature=0, eos=eos)
    assert filled.tolist() == [free[0][:end] + [eos] * (11 - end), free[1]]
    assert model.generate([4], 10, temperature=0, eos=eos) == free[0][:end]


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        ([], {}, "nothing to continue"),
        ([300], {}, "vocabulary of 300"),
        ([-1], {}, "vocabulary of 300"),
        ([1], {"temperature": -1.0}, "temperature -1.0"),
        ([1], {"temperature": math.nan}, "temperature nan"),
        ([1], {"top_k": 0}, "top_k 0"),
        ([1], {"top_p": 0.0}, "top_p 0.0"),
    ],
)
def test_what_cannot_be_generated_is_said(ids: list[int], options: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_model().generate(ids, 3, **options)


# Perplexity


@pytest.mark.parametrize("count", [2, 3, 12, 13, 14, 18, 19, 40, 100])
def test_perplexity_counts_every_token_once(count: int) -> None:
    """Against one forward per token, over what its window holds: the first context, then half a context at a time."""
    model = make_model()
    ids = torch.randint(300, (count,), generator=torch.Generator().manual_seed(count)).tolist()
    length, half, total = CONFIG.seq_len, CONFIG.seq_len // 2, 0.0
    for i in range(1, count):
        end = length if i <= length else length + half * math.ceil((i - length) / half)
        start = max(0, min(end, count - 1) - length)
        logits = model(torch.tensor([ids[start:i]]))[0, -1]
        total -= logits.double().log_softmax(-1)[ids[i]].item()
    loss = perplexity(model.train(), ids)  # in any mode without dropout
    assert loss.tokens == count - 1
    assert loss.nats == pytest.approx(total / (count - 1), rel=1e-5)
    assert loss.perplexity == pytest.approx(math.exp(total / (count - 1)), rel=1e-4)


def test_a_model_that_knows_nothing_needs_the_bits_of_its_vocabulary() -> None:
    model = make_model(replace(CONFIG, vocab_size=256))
    with torch.no_grad():
        model.layers[-1].project.weight.zero_()
    loss = perplexity(model.train(), torch.arange(51))
    assert loss.perplexity == pytest.approx(256, rel=1e-5)
    assert loss.bits_per_byte(100) == pytest.approx(8 * 50 / 100, rel=1e-6)


def test_a_text_needs_two_tokens_of_the_vocabulary() -> None:
    for ids, message in (([], "at least two"), ([5], "at least two"), ([5, 300], "vocabulary of 300")):
        with pytest.raises(UserError, match=message):
            perplexity(make_model(), ids)


# Text


def test_encode_and_decode(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "<s>def f(): return 'नमस्ते 🙂'\n\t</s>"
    ids = fira.encode(text, tokenizer)
    assert ids[-1] == eos_id(tokenizer)
    assert fira.decode(ids, tokenizer) == fira.decode(torch.tensor(ids), tokenizer) == text
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    assert fira.encode(text, path) == fira.encode(text, str(path)) == ids
    monkeypatch.chdir(tmp_path)
    assert fira.encode(text) == ids  # the one in this folder
    assert fira.decode(ids) == text
    with pytest.raises(UserError, match="no such tokenizer"):
        fira.encode(text, "missing.json")


def test_without_a_tokenizer_that_of_the_default_corpus_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "corpus.txt").write_text(TEXT * 9, encoding="utf-8")
    wanted: list[int] = []

    def small_corpus(vocab_size: int) -> Corpus:
        wanted.append(vocab_size)
        return prepare(str(tmp_path / "corpus.txt"), vocab_size=vocab_size, cache_dir=tmp_path, progress=False)

    monkeypatch.setattr("fira.generation.text.prepare", small_corpus)
    monkeypatch.chdir(tmp_path)
    _default_tokenizer.cache_clear()
    ids = fira.encode(TEXT)
    assert fira.decode(ids) == TEXT
    assert wanted == [2048]  # the vocabulary of the model that is trained by default, and prepared once
    small = Tokenizer.from_file(str(small_corpus(2048).tokenizer))
    assert ids == small.encode(TEXT, add_special_tokens=False).ids
    _default_tokenizer.cache_clear()


def test_public_names_are_loaded_when_asked_for() -> None:
    script = "import sys, fira; assert 'torch' not in sys.modules; fira.FIRA; assert 'torch' in sys.modules"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=60).returncode == 0
    assert all(callable(getattr(fira, name)) for name in fira.__all__)
    with pytest.raises(AttributeError, match="no attribute 'wrong'"):
        _ = fira.wrong


# Checkpoints


def test_a_loaded_model_is_the_saved_one(run_folder: Path, tokenizer: Tokenizer) -> None:
    tokens = torch.randint(300, (2, 12), generator=torch.Generator().manual_seed(0))
    for path in (run_folder, run_folder / "checkpoints", run_folder / "checkpoints" / "step-000007"):
        model = load_model(path)
        assert torch.equal(model(tokens), make_model()(tokens))
        assert model.config == CONFIG
        assert model.tokenizer.to_str() == tokenizer.to_str()
        assert not model.training
        assert all(p.requires_grad for p in model.parameters())


def test_what_cannot_be_loaded_is_said(run_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint here"):
        load_model(tmp_path / "nothing")
    other = save(tmp_path / "foreign", make_model(), {}, {"family": "gpt"})
    with pytest.raises(UserError, match="unknown model family 'gpt'"):
        load_model(other)
    other = save(tmp_path / "shape", make_model(), {}, to_document(replace(CONFIG, d_ff=32)))
    with pytest.raises(UserError, match=r"experts\.w1 .*config\.json"):
        load_model(other)
    other = save(tmp_path / "layers", make_model(), {}, to_document(replace(CONFIG, num_layers=3)))
    with pytest.raises(UserError, match=r"layers\.3.*another model"):
        load_model(other)
    weights = next(run_folder.glob("checkpoints/step-000007/model-*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match=weights.name):
        load_model(run_folder)


# scripts/generate.py


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
    written = make_model().generate(ids, 8, eos=eos_id(tokenizer), **settings)
    flags = [f"--{name}={value}" for name, value in settings.items()]
    for length in ("--max_new_tokens=8", "--max_length=8", "--max_num_tokens=8"):
        generate(monkeypatch, "--checkpoint", run_folder, "--prompt", prompt, length, *flags)
        out, err = capsys.readouterr()
        assert out.startswith(prompt)
        assert out.rstrip("\n") == fira.decode(written, tokenizer).removesuffix("</s>").rstrip("\ufffd\n")
        assert "tokens/s" in err


def test_script_takes_a_name_in_out_and_reports(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With and without extension, and a prompt from standard input."""
    run_folder.parent.joinpath("out").mkdir()
    run_folder.rename(run_folder.parent / "out" / "my")
    monkeypatch.chdir(run_folder.parent)
    said = []
    for name in ("my", "my.pth"):
        monkeypatch.setattr("sys.stdin", io.StringIO("def main"))
        generate(monkeypatch, "--prompt", "-", "--max_num_tokens", "8", "--model_name", name, "--temperature=0")
        said.append(capsys.readouterr().out)
    text = sample_text(load_model("out/my"), "def main", 8, temperature=0)
    start = f"Prompt: def main\nGenerated text: {text.removeprefix('def main')}\nGenerated text length: "
    assert all(one.startswith(start) for one in said)
    assert re.search(r"Inference time: \d+\.\d\d s\n$", said[0])


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


def test_script_needs_a_tokenizer(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = save(tmp_path / "shards", make_model(), {})
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    generate(
        monkeypatch, "--checkpoint", step, "--tokenizer", tmp_path / "tokenizer.json", "--prompt", "def", "--seed=1"
    )
    assert capsys.readouterr().out.startswith("def")
    fails(monkeypatch, capsys, "--tokenizer", "--checkpoint", step, "--prompt", "def")


def fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], message: str, *arguments: str | Path
) -> None:
    """The script ends with status 2 and one line."""
    with pytest.raises(SystemExit) as end:
        generate(monkeypatch, *arguments)
    out, err = capsys.readouterr()
    assert end.value.code == 2
    assert message in err
    assert err.count("\n") == 1
    assert "Traceback" not in err + out


def test_script_says_in_one_line_what_is_wrong(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "binary").write_bytes(bytes(range(128, 256)))
    for message, arguments in (
        ("no checkpoint here", ["--checkpoint", tmp_path / "missing"]),
        ("top_k 0", ["--checkpoint", run_folder, "--top-k=0"]),
        ("temperature", ["--checkpoint", run_folder, "--temperature=-1"]),
        ("invalid int value", ["--checkpoint", run_folder, "--seed=x"]),
        ("unrecognized arguments: --wrong", ["--checkpoint", run_folder, "--wrong"]),
        ("not allowed with", ["--checkpoint", run_folder, "--model_name=run"]),
        ("greater length", ["--checkpoint", run_folder, "--prompt=def main", "--max_length=0"]),
        ("min_p 2.0", ["--checkpoint", run_folder, "--min_p=2"]),
        ("neither a folder nor a file", ["--model_name", "run"]),
        ("UTF-8", ["--checkpoint", run_folder, "--eval-text", tmp_path / "binary"]),
        ("nothing to predict", ["--checkpoint", run_folder, "--eval-text", ""]),
    ):
        fails(monkeypatch, capsys, message, *arguments)
