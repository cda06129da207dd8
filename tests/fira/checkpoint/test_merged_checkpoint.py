"""Checkpoints of adapters, read with the adapters merged into the weights of their base model."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fira import load_model
from fira.checkpoint.merged_checkpoint import AdapterRecord
from fira.checkpoint.pretrained import open_saved
from fira.checkpoint.shard_index import TensorShard
from fira.errors import UserError
from fira.huggingface.export_model import export
from fira.models.adapters import add_adapters
from fira.models.language_model import LanguageModel
from fira.models.registry import to_document
from fira.nn.context import Context
from fira.nn.lora import Lora
from tests.fira.models import small_fira
from tests.fira.models.small_families import CONFIGS, make_model, make_tokens
from tests.saving import save_checkpoint

MODELS = {"fira": small_fira.CONFIG, **{name: CONFIGS[name] for name in ("rish", "mooshak", "blues", "microrwkv")}}
ALL = Lora(2, 6.0, ("attention", "experts", "head"))


def step_folder(root: Path, weights: dict[str, Tensor], config: Any, record: AdapterRecord | None = None) -> Path:
    shards = [TensorShard(name, value.detach(), 0, tuple(value.shape)) for name, value in weights.items()]
    documents = {"config": to_document(config)} | ({"lora": record.document()} if record else {})
    return save_checkpoint(root / "checkpoints", 7, shards, [], documents, {}, {}, 2)


def adapted(place: Path, name: str, dtype: torch.dtype = torch.float64) -> tuple[LanguageModel, Path]:
    """A model with random adapters, unmerged, and the folder of its checkpoint next to that of its base."""
    model = make_model(MODELS[name], dtype)
    base = step_folder(place / "base", model.weights(), model.config)
    lora = replace(ALL, targets=ALL.targets[:2]) if model.tied else ALL
    add_adapters(model, lora)
    adapters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    torch.manual_seed(2)
    for parameter in adapters.values():
        torch.nn.init.normal_(parameter, std=0.3)
    record = AdapterRecord.of(lora, open_saved(base))
    return model, step_folder(place / "run", adapters, model.config, record)


@pytest.mark.parametrize("name", MODELS)
def test_merged_model_equals_the_unmerged_one(name: str, tmp_path: Path) -> None:
    model, folder = adapted(tmp_path, name)
    tokens = make_tokens(model.config, length=9)
    for path in (folder, tmp_path / "run", tmp_path / "run" / "checkpoints"):
        merged = load_model(path)
        assert merged.weights().keys() == {n for n in model.weights() if ".lora" not in n}
        torch.testing.assert_close(merged(tokens, Context()), model(tokens, Context()), rtol=1e-12, atol=1e-12)
    change = (merged(tokens, Context()) - load_model(tmp_path / "base")(tokens, Context())).abs().max()
    assert change > 1e-2


def test_rows_are_merged_as_the_whole_tensor_is(tmp_path: Path) -> None:
    """Rows of a matrix are outputs, rows of experts' weights are experts."""
    _, folder = adapted(tmp_path, "rish")
    saved = open_saved(folder)
    for name in ("layers.1.attention.q.weight", "layers.2.moe.experts.w1", "layers.1.norm1.weight"):
        whole = saved.read(name)
        torch.testing.assert_close(saved.read(name, 1, 4), whole[1:4], rtol=1e-13, atol=1e-13)
        assert saved.shape(name) == tuple(whole.shape)


def test_hash_of_a_merged_model_depends_on_adapters_and_their_settings(tmp_path: Path) -> None:
    """A teacher of a distillation may have adapters."""
    model, folder = adapted(tmp_path, "mooshak")
    base, first = open_saved(tmp_path / "base"), open_saved(folder).weights_hash()
    assert first == open_saved(folder).weights_hash() != base.weights_hash()
    weights = {name: value for name, value in model.named_parameters() if ".lora" in name}
    other = AdapterRecord.of(replace(ALL, alpha=ALL.alpha + 1), base)
    changed = {name: value + 1 for name, value in weights.items()}
    found = [
        open_saved(step_folder(tmp_path / f"run-{number}", values, model.config, record)).weights_hash()
        for number, (values, record) in enumerate([(weights, other), (changed, AdapterRecord.of(ALL, base))])
    ]
    assert len({first, *found}) == 3


def test_base_in_lower_precision_is_read_in_that_of_the_adapters(tmp_path: Path) -> None:
    model, _ = adapted(tmp_path, "mooshak", torch.float32)
    half = {name: value.to(torch.bfloat16) for name, value in make_model(MODELS["mooshak"]).weights().items()}
    shutil.rmtree(tmp_path / "base")
    base = open_saved(step_folder(tmp_path / "base", half, model.config))
    weights = {name: value for name, value in model.named_parameters() if ".lora" in name}
    shutil.rmtree(tmp_path / "run")
    merged = load_model(step_folder(tmp_path / "run", weights, model.config, AdapterRecord.of(ALL, base)))
    assert {value.dtype for value in merged.weights().values()} == {torch.float32}
    name = "layers.1.attention.q"
    delta = 3 * (weights[f"{name}.lora_b.weight"] @ weights[f"{name}.lora_a.weight"])
    assert torch.equal(merged.weights()[f"{name}.weight"], half[f"{name}.weight"].float() + delta)


def test_merged_model_is_exported_and_can_be_a_base(tmp_path: Path) -> None:
    model, folder = adapted(tmp_path, "fira")
    with pytest.raises(UserError, match="has adapters of its own; export the model, and give the exported folder"):
        AdapterRecord.of(ALL, open_saved(folder))
    exported = export(folder, tmp_path / "exported")
    tokens = make_tokens(model.config, length=9)
    torch.testing.assert_close(load_model(exported)(tokens, Context()), model(tokens, Context()), rtol=0, atol=1e-12)
    record = AdapterRecord.of(ALL, open_saved(exported))
    weights = {name: value for name, value in model.named_parameters() if ".lora" in name}
    again = load_model(step_folder(tmp_path / "again", weights, model.config, record))
    q = "layers.1.attention.q"
    delta = 3 * weights[f"{q}.lora_b.weight"] @ weights[f"{q}.lora_a.weight"]
    difference = again.weights()[f"{q}.weight"] - model.weights()[f"{q}.weight"]
    torch.testing.assert_close(difference, 2 * delta, rtol=1e-12, atol=1e-12)
    (exported / "model.safetensors").write_bytes((exported / "model.safetensors").read_bytes()[:-8] + b"8" * 8)
    with pytest.raises(UserError, match=r"its base model .*exported has changed"):
        load_model(tmp_path / "again")


def test_base_that_is_missing_or_has_changed_is_named(tmp_path: Path) -> None:
    model, folder = adapted(tmp_path, "mooshak")
    base = tmp_path / "base" / "checkpoints" / "step-000007"
    base.rename(tmp_path / "moved")
    with pytest.raises(UserError) as error:
        load_model(folder)
    assert str(error.value) == f"{folder}: its base model {base} is missing; move it back, or link it there"
    base.symlink_to(tmp_path / "moved")
    load_model(folder)
    base.unlink()
    changed = {name: value + 1e-9 for name, value in load_model(tmp_path / "moved").weights().items()}
    step_folder(tmp_path / "base", changed, model.config)
    with pytest.raises(UserError) as error:
        load_model(folder)
    assert str(error.value) == (
        f"{folder}: its base model {base} has changed since the adapters were trained; restore it, or train the "
        "adapters again"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 3}, "lora_a.weight and .*lora_b.weight do not fit"),
        ({"rank": 0}, "rank is 0"),
        ({"targets": ["mlp"]}, r"targets\[0\] is 'mlp', not one of attention, experts, head"),
        ({"base": {"folder": "/", "sha256": "x"}}, "base.sha256 is 'x'"),
    ],
)
def test_forged_record_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    model, folder = adapted(tmp_path, "mooshak")
    document = json.loads((folder / "lora.json").read_text()) | change
    weights = {name: value.detach() for name, value in model.named_parameters() if ".lora" in name}
    shards = [TensorShard(name, value, 0, tuple(value.shape)) for name, value in weights.items()]
    documents = {"config": to_document(model.config), "lora": document}
    forged = save_checkpoint(tmp_path / "forged", 7, shards, [], documents, {}, {}, 2)
    with pytest.raises(UserError, match=message):
        load_model(forged)
