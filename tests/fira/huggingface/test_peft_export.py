"""Adapters in the format of peft: against the rules by which peft computes weights, and with peft if it is installed.

peft adds lora_B · lora_A · α/r to the weight of a linear layer. For a parameter [E, out, in] it reads lora_A as
[E, r, in] and lora_B as [out, r, E] (`get_delta_weight` in peft/tuners/lora/layer.py, version 0.21).
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from fira import load_model
from fira.checkpoint.merged_checkpoint import AdapterRecord
from fira.checkpoint.pretrained import open_saved
from fira.errors import UserError
from fira.huggingface.export_model import export
from fira.models.adapters import add_adapters
from fira.models.mooshak import MooshakConfig
from fira.models.registry import build
from fira.nn.context import Context
from fira.nn.lora import Lora
from tests.fira.checkpoint.test_merged_checkpoint import MODELS, adapted, step_folder
from tests.fira.models.small_families import make_tokens


def change(folder: Path, name: str) -> torch.Tensor | None:
    """What peft adds to a weight of the exported base model, `model.layers.…`; None if it is not adapted."""
    config, tensors = (
        json.loads((folder / "adapter_config.json").read_text()),
        load_file(folder / "adapter_model.safetensors"),
    )
    scale = config["lora_alpha"] / config["r"]
    module, _, parameter = name.rpartition(".")
    targets = [target.rpartition(".") for target in config["target_parameters"]]
    same = [p for m, _, p in targets if m == module]
    is_linear = module in config["target_modules"] and parameter == "weight"
    if not is_linear and parameter not in same:
        return None
    inside = 0 if is_linear else len(same) - 1 - same.index(parameter)
    a, b = (tensors[f"base_model.model.{module}{inside * '.base_layer'}.lora_{x}.weight"] for x in "AB")
    if is_linear:
        return scale * b @ a
    r = config["r"]
    a, b = a.reshape(-1, r, a.shape[1]), b.reshape(len(b), r, -1)
    return scale * torch.einsum("ore,eri->eoi", b, a)


@pytest.mark.parametrize("name", MODELS)
def test_weights_that_peft_computes_are_the_merged_ones(name: str, tmp_path: Path) -> None:
    model, folder = adapted(tmp_path, name)
    out = export(folder, tmp_path / "out", "peft")
    merged, base = load_model(folder).weights(), load_model(tmp_path / "base").weights()
    adapters, found = {n for n in model.weights() if ".lora" in n}, 0
    for weight, value in merged.items():
        delta = change(out, f"model.{weight}")
        torch.testing.assert_close(
            value, base[weight] if delta is None else base[weight] + delta, rtol=1e-12, atol=1e-12
        )
        found += delta is not None
    assert 2 * found == len(adapters) == len(load_file(out / "adapter_model.safetensors"))


@pytest.mark.parametrize("name", MODELS)
def test_peft_loads_the_adapters_on_the_exported_base_model(name: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, folder = adapted(tmp_path, name, torch.float32)
    base = export(tmp_path / "base", tmp_path / "exported")
    loaded = AutoModelForCausalLM.from_pretrained(base)
    wrapped = peft.PeftModel.from_pretrained(loaded, export(folder, tmp_path / "out", "peft"))
    tokens = make_tokens(model.config, length=9)
    with torch.no_grad():
        expected = load_model(folder)(tokens, Context())
        torch.testing.assert_close(wrapped(tokens).logits, expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(wrapped.merge_and_unload()(tokens).logits, expected, rtol=0, atol=1e-6)


def test_names_are_those_of_transformers_if_the_base_is_a_llama(tmp_path: Path) -> None:
    sizes = {"vocab_size": 31, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2}
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=6, max_position_embeddings=24))
    llama.save_pretrained(tmp_path / "llama")
    base = load_model(tmp_path / "llama")
    assert isinstance(base.config, MooshakConfig)
    lora = Lora(2, 6.0, ("attention", "experts", "head"))
    model = build(base.config)
    add_adapters(model, lora)
    adapters = {n: torch.nn.init.normal_(p, std=0.3) for n, p in model.named_parameters() if p.requires_grad}
    record = AdapterRecord.of(lora, open_saved(tmp_path / "llama"))
    folder = step_folder(tmp_path / "run", adapters, model.config, record)
    out = export(folder, tmp_path / "out", "peft")
    merged = LlamaForCausalLM.from_pretrained(export(folder, tmp_path / "merged", "llama")).state_dict()
    for name, value in llama.state_dict().items():
        delta = change(out, name)
        assert (delta is None) == ("norm" in name or "embed" in name)
        torch.testing.assert_close(merged[name], value if delta is None else value + delta, rtol=1e-5, atol=1e-6)


def test_a_model_without_adapters_is_refused(tmp_path: Path) -> None:
    adapted(tmp_path, "mooshak")
    with pytest.raises(UserError, match=r"base.* has no adapters; give a run with --lora, or omit --format"):
        export(tmp_path / "base", tmp_path / "out", "peft")
    assert not (tmp_path / "out").exists()
