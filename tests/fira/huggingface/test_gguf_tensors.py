"""Tensors of GGUF that are read from a base model and its adapters, and from a folder of transformers."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fira import load_model
from fira.checkpoint.pretrained import open_saved
from fira.huggingface.export_model import export
from fira.huggingface.gguf_tensors import gguf_tensors
from tests.fira.checkpoint.test_merged_checkpoint import adapted
from tests.fira.huggingface.gguf_models import OLMOE, save


def test_adapters_are_merged(tmp_path: Path) -> None:
    _, folder = adapted(tmp_path, "mooshak")
    saved, model = open_saved(folder), load_model(folder)
    tensors = {tensor.name: tensor.read(saved) for tensor in gguf_tensors(model)}
    assert len(tensors) == len(model.weights())
    for name, weight in (("blk.1.attn_v", "layers.2.attention.v"), ("blk.0.ffn_down", "layers.1.mlp.w2")):
        expected = model.weights()[f"{weight}.weight"].float()
        assert torch.equal(tensors[f"{name}.weight"], expected)
        assert not torch.allclose(expected, load_model(tmp_path / "base").weights()[f"{weight}.weight"].float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_of_transformers_is_read(dtype: torch.dtype, tmp_path: Path) -> None:
    sizes = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4)).to(dtype)
    llama.save_pretrained(tmp_path / "llama")
    saved, model = open_saved(tmp_path / "llama"), load_model(tmp_path / "llama")
    tensors = {tensor.name: tensor.read(saved) for tensor in gguf_tensors(model)}
    gate = llama.state_dict()["model.layers.1.mlp.gate_proj.weight"]
    assert torch.equal(tensors["blk.1.ffn_gate.weight"], gate.float())


def test_experts_in_files_of_their_own_are_read(tmp_path: Path) -> None:
    step = save(tmp_path / "run", replace(OLMOE, num_layers=1))
    folder = export(step, tmp_path / "olmoe", "olmoe")
    model = load_model(step)
    for tensor in gguf_tensors(model):
        assert torch.equal(tensor.read(open_saved(step)), tensor.read(open_saved(folder))), tensor.name
