"""Export of the adapters of a LoRA run as a folder that the package peft loads on the exported base model.

    Fira                                             peft, after base_model.model.
    layers.3.attention.q.lora_a.weight  [r, in]      model.layers.3.attention.q.lora_A.weight    [r, in]
    layers.3.attention.q.lora_b.weight  [out, r]     model.layers.3.attention.q.lora_B.weight    [out, r]
    layers.3.moe.experts.lora.w1.a      [E, r, in]   model.layers.3.moe.experts.….lora_A.weight  [E · r, in]
    layers.3.moe.experts.lora.w1.b      [E, out, r]  model.layers.3.moe.experts.….lora_B.weight  [out, r · E]

Weights of experts are `target_parameters` of peft. It wraps a module once for each of them, in their order, and the
inner wrappers are called `base_layer`. If the base model is a folder of transformers, the names are its own.
"""

import json
from collections import defaultdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from fira.checkpoint.merged_checkpoint import MergedCheckpoint
from fira.checkpoint.pretrained import PretrainedModel, open_saved, stored_config
from fira.errors import UserError
from fira.models.registry import build
from fira.nn.lora import Lora


def save_adapters(checkpoint: str | Path, folder: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors. Raises UserError if the checkpoint has no adapters."""
    saved = open_saved(checkpoint)
    if not isinstance(saved, MergedCheckpoint):
        raise UserError(f"--format peft: {saved.folder} has no adapters; give a run with --lora, or omit --format")
    with torch.device("meta"):
        names = list(build(stored_config(saved)).weights())
    modules, experts = {}, defaultdict(list)  # adapters by module, and of experts by module in the order of its weights
    for name in names:
        if (pair := saved.adapter(name)) is not None:
            module, _, parameter = _name_in_transformers(saved, name).rpartition(".")
            if parameter == "weight":
                modules[module] = pair
            else:
                experts[module].append((parameter, _as_linear_layers(*pair)))
    tensors = _tensors(modules)
    for module, wrappers in experts.items():
        for inside, (_, pair) in enumerate(reversed(wrappers)):
            tensors |= _tensors({module + inside * ".base_layer": pair})
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    targets = [f"{module}.{parameter}" for module, wrappers in experts.items() for parameter, _ in wrappers]
    config = _peft_config(saved.record.lora, list(modules), targets)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _peft_config(lora: Lora, modules: list[str], parameters: list[str]) -> dict[str, object]:
    """The content of adapter_config.json. modules, parameters: full names of adapted layers and of experts' weights."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": modules,
        "target_parameters": parameters,
    }


def _name_in_transformers(saved: MergedCheckpoint, name: str) -> str:
    """The name of a weight in the exported base model, or in the folder of transformers that is the base model."""
    return saved.base.module_name(name) if isinstance(saved.base, PretrainedModel) else f"model.{name}"


def _as_linear_layers(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a [E, r, in] and b [E, out, r] in the form of peft, as weights of two linear layers of width r · E."""
    return a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)


def _tensors(adapters: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """The tensors of adapters by module, with their names in peft's file."""
    return {
        f"base_model.model.{module}.lora_{letter}.weight": matrix.contiguous()
        for module, pair in adapters.items()
        for letter, matrix in zip("AB", pair, strict=True)
    }
