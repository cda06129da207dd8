"""Export to transformers, with our code and in its own classes, and training of models that it has saved."""

import json
import os
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, FlexOlmoConfig, FlexOlmoForCausalLM, LlamaConfig, LlamaForCausalLM

from fira import load_model
from fira.checkpoint.shard_index import TensorShard
from fira.checkpoint.transformers_mapping import TRANSFORMERS
from fira.commands.export import FORMATS
from fira.data.tokenizer import train_tokenizer
from fira.errors import UserError
from fira.huggingface.export_model import export
from fira.models.language_model import LanguageModel
from fira.models.registry import FAMILIES, to_document
from fira.nn.context import Context
from tests.fira.huggingface.test_modeling_fira import IDS, small, trained
from tests.launch import ROOT, run_ranks
from tests.ranks.stock_transformers import IDS as STOCK_IDS
from tests.ranks.stock_transformers import run_isolated
from tests.saving import save_checkpoint

TEXT = Path(__file__).read_text()
VOCABULARY = 300
LLAMA: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([TEXT], VOCABULARY)


def save(folder: Path, model: LanguageModel, tokenizer: Tokenizer) -> Path:
    """Save a model as a step folder of training."""
    weights = [TensorShard(name, value.detach(), 0, tuple(value.shape)) for name, value in model.weights().items()]
    files = {"tokenizer.json": tokenizer.to_str().encode()}
    return save_checkpoint(folder, 7, weights, [], {"config": to_document(model.config)}, files, {}, 2)


def model_for_tokenizer(family: str, **changes: Any) -> LanguageModel:
    return trained(replace(small(family), vocab_size=VOCABULARY, **changes))


@pytest.fixture(scope="module")
def exports(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[LanguageModel, Path]]:
    """A model of each family, and its export."""
    folder, exported = tmp_path_factory.mktemp("exports"), {}
    for family in FAMILIES:
        model = model_for_tokenizer(family)
        exported[family] = model, export(save(folder / f"{family}-run", model, tokenizer), folder / f"{family}-v1.0")
    return exported


@pytest.mark.slow
def test_export_loads_without_this_package(exports: dict[str, tuple[LanguageModel, Path]], tmp_path: Path) -> None:
    results = run_isolated(tmp_path, *(folder for _, folder in exports.values()))
    for family, (model, folder) in exports.items():
        expected = model(torch.tensor([[*STOCK_IDS]]), Context())[0].detach().numpy()
        np.testing.assert_allclose(np.load(tmp_path / f"{folder.name}.npy"), expected, atol=1e-5, rtol=0)
        result = results[folder.name]
        assert result["classes"][1] == "transformers_modules"
        assert result["single"].startswith("def f")
        assert len(result["single"]) > len("def f")
        assert result["batch"][0] == result["single"], family
        assert result["chat"] == "<|prompter|>Hi</s><|assistant|>yes</s><|prompter|>no</s><|assistant|>"
        assert not list(folder.glob("*.bin"))
        saved = {path.name: path.read_text() for path in (tmp_path / "copy-of-copy" / folder.name).glob("*.py")}
        assert saved == {path.name: path.read_text() for path in folder.glob("*.py")}


def test_export_can_be_loaded_as_checkpoint(
    exports: dict[str, tuple[LanguageModel, Path]],
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for model, folder in exports.values():
        loaded = load_model(folder)
        assert loaded.config == model.config
        limits = json.loads((folder / "generation_config.json").read_text())
        assert limits["max_length"] == model.config.seq_len
        assert "max_new_tokens" not in limits
        assert all(torch.equal(value, loaded.weights()[name]) for name, value in model.weights().items())
        assert loaded.tokenizer.get_vocab() == tokenizer.get_vocab()
    monkeypatch.setattr("sys.argv", ["generate.py", "--checkpoint", str(folder), "--prompt", "def ", "--seed=1"])
    runpy.run_path(str(ROOT / "scripts" / "generate.py"), run_name="__main__")
    assert capsys.readouterr().out.startswith("def ")


@pytest.mark.parametrize(
    ("family", "form", "changes"),
    [
        ("mooshak", "llama", {}),
        ("mooshak", "llama", {"n_kv_head": 1, "tied": True, "rope_theta": 5e5}),
        ("mooshak", "llama", {"rope_factor": 8.0, "rope_original": 16}),
        ("mooshak", "llama", {"relu_squared": True}),
        ("rish", "flexolmo", {"relu_squared": True}),
        ("rish", "flexolmo", {"max_position": 5, "rope_factor": 2.0, "top_k": 0.8}),
        ("rish", "olmoe", {"norm_order": "pre", "max_position": 5, "rope_factor": 2.0}),
    ],
)
def test_export_to_class_of_transformers_has_equal_logits(
    family: str, form: str, changes: dict[str, Any], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model = model_for_tokenizer(family, **changes)
    step = save(tmp_path / "run", model, tokenizer)
    folder = export(step, tmp_path / "out", form)
    other = AutoModelForCausalLM.from_pretrained(folder)
    assert type(other).__module__.startswith("transformers.models")
    torch.testing.assert_close(other(IDS).logits, model(IDS, Context()), rtol=0, atol=1e-5)
    assert other.generate(IDS[:1], max_length=12, eos_token_id=None).shape == (1, 12)
    assert other.generate(IDS[:1], max_new_tokens=2, eos_token_id=None).shape == (1, IDS.shape[1] + 2)
    assert other.generate(IDS[:1], eos_token_id=None).shape == (1, model.config.seq_len)
    loaded = load_model(folder)
    torch.testing.assert_close(loaded(IDS, Context()), model(IDS, Context()), rtol=0, atol=0)
    wrong = "olmoe" if form == "llama" else "llama"
    with pytest.raises(UserError, match=f"a {family} has no equivalent"):
        export(step, tmp_path / "wrong", wrong)
    with pytest.raises(UserError, match="not empty"):
        export(step, folder, form)
    with pytest.raises(UserError, match=r"run.*step-000007/manifest.json.*: Not a directory"):
        export(step, step / "manifest.json" / "out", form)


def test_options_without_equivalent_raise(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for form, family, option, value in (
        ("llama", "mooshak", "norm_order", "post"),
        ("llama", "mooshak", "qk_norm", True),
        ("llama", "mooshak", "softcap", 30.0),
        ("flexolmo", "rish", "norm_order", "pre"),
        ("olmoe", "rish", "norm_order", "post"),
        ("flexolmo", "rish", "value_embeddings", True),
        ("flexolmo", "rish", "residual_scalars", True),
    ):
        step = save(tmp_path / option, model_for_tokenizer(family, **{option: value}), tokenizer)
        with pytest.raises(UserError, match=f"{option}={value} has no equivalent"):
            export(step, tmp_path / "out", form)
    llama = LlamaForCausalLM(LlamaConfig(**LLAMA))
    llama.save_pretrained(tmp_path / "llama")
    path = tmp_path / "llama" / "config.json"
    document = json.loads(path.read_text())
    for change, message in (
        ({"model_type": "qwen2"}, "model_type qwen2"),
        ({"attention_bias": True}, "attention_bias True has no equivalent"),
        ({"hidden_act": "gelu"}, "hidden_act gelu has no equivalent"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type yarn has no equivalent"),
        ({"rope_scaling": {"type": "llama3"}, "rope_parameters": None}, "no factor"),
        ({"head_dim": 16}, "head_dim 16"),
        ({"num_hidden_layers": 3}, r"no tensor model\.layers\.2"),
        ({"intermediate_size": 41}, r"mlp.* has shape \(40, 32\)"),
    ):
        path.write_text(json.dumps(document | change))
        with pytest.raises(UserError, match=message):
            load_model(tmp_path / "llama")
    path.write_text(json.dumps(document))
    weights = tmp_path / "llama" / "model.safetensors"
    os.truncate(weights, 1000)
    with pytest.raises(UserError, match=r"model\.safetensors"):
        load_model(tmp_path / "llama")
    weights.unlink()
    with pytest.raises(UserError, match="as safetensors"):
        load_model(tmp_path / "llama")


def test_sharded_flexolmo_and_tied_llama_are_loaded(tmp_path: Path) -> None:
    tied = LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=True))
    experts = {"num_experts": 5, "num_experts_per_tok": 2, "pad_token_id": 2, "num_key_value_heads": 4}
    flexolmo = FlexOlmoForCausalLM(FlexOlmoConfig(**LLAMA | experts))
    for name, other in (("llama", tied), ("flexolmo", flexolmo)):
        with torch.no_grad():
            for p in other.parameters():
                p += 0.1 * torch.randn(p.shape)
        other.eval().save_pretrained(tmp_path / name, max_shard_size="40KB")
        assert len(list((tmp_path / name).glob("model-*.safetensors"))) > 1
        model = load_model(tmp_path / name)
        torch.testing.assert_close(model(IDS, Context()), other(IDS).logits, rtol=0, atol=1e-5)


def test_llama_is_trained_further_and_exported_again(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """On two pipeline stages. Two steps at a small learning rate change every weight, by less than 1e-3."""
    llama = LlamaForCausalLM(LlamaConfig(**LLAMA)).eval()
    llama.save_pretrained(tmp_path / "llama")
    tokenizer.save(str(tmp_path / "llama" / "tokenizer.json"))
    (tmp_path / "text.txt").write_text(TEXT)
    flags = ["--init", tmp_path / "llama", "--data", tmp_path / "text.txt", "--out", tmp_path / "run", "--steps", 2]
    sizes = ["--batch-size", 4, "--eval-sequences", 4, "--lr", 1e-4, "--warmup", 1, "--pp", 2]
    environment = {"FIRA_CACHE": str(tmp_path / "cache")}
    done = run_ranks(2, ROOT / "scripts" / "train.py", *flags, *sizes, timeout=100, env=environment)
    assert done.returncode == 0, done.stderr
    assert "llama: " in done.stdout
    exported = LlamaForCausalLM.from_pretrained(export(tmp_path / "run", tmp_path / "exported", "llama"))
    changes = [(value - llama.state_dict()[name]).abs().max() for name, value in exported.state_dict().items()]
    assert all(0 < change < 1e-3 for change in changes)
    model = load_model(tmp_path / "run")
    torch.testing.assert_close(model(IDS, Context()), exported(IDS).logits, rtol=0, atol=1e-5)
    assert model.tokenizer.get_vocab() == tokenizer.get_vocab()


def test_command_offers_every_format() -> None:
    assert set(FORMATS) == {"fira", *TRANSFORMERS, "peft", "gguf"}
