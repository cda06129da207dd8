"""Checkpoints and exports that were written before the source tree was reorganised still load, and compute the same.

Each archive in tests/fixtures/before_redesign holds for one family `checkpoint/`, `export/`, for some `stock/`, and
`expected.json`: `ids`, the logits of their last position as hexadecimal floats, and a greedy continuation.
The recorded logits are compared within 1e-5, because the order of summation in a matrix product depends on the CPU. The
present code and the code inside an older export are compared on one machine and are bitwise identical.
"""

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import fira.huggingface
from fira import load_model
from fira.data.tokenizer_config import TEMPLATE
from fira.huggingface.export_model import export
from fira.models.registry import to_document
from tests.launch import ROOT
from tests.ranks.stock_transformers import CONVERSATION, IDS, run_isolated

FAMILIES = ("blues", "fira", "microrwkv", "mooshak", "rish")
STOCK = {"mooshak": "llama", "rish": "flexolmo"}
each_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the extracted archive of each family."""
    folder = tmp_path_factory.mktemp("older")
    for family in FAMILIES:
        with tarfile.open(ROOT / f"tests/fixtures/before_redesign/{family}.tar.xz") as archive:
            archive.extractall(folder / family, filter="data")
    return folder


def expected(folder: Path) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """ids [1, T], logits [V] after the last one, and the greedy continuation."""
    document: dict[str, Any] = json.loads((folder / "expected.json").read_text())
    assert document["ids"] == [*IDS]
    logits = torch.tensor([float.fromhex(number) for number in document["logits_last"]])
    return torch.tensor([document["ids"]]), logits, document["greedy"]


def document(path: Path) -> dict[str, Any]:
    """Return the values of a file, without the version of transformers that wrote it."""
    values = json.loads(path.read_text())
    del values["transformers_version"]
    return values


def formatted_chat(folder: Path) -> dict[str, list[int]]:
    """Tokens of a chat, and which of them the assistant generates, by the template of an export."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return dict(tokenizer.apply_chat_template(CONVERSATION, return_dict=True, return_assistant_tokens_mask=True))


@each_family
@pytest.mark.parametrize("source", ["checkpoint", "export"])
@torch.no_grad()
def test_load_model_gives_equal_logits_and_tokens(older: Path, family: str, source: str) -> None:
    ids, logits, greedy = expected(older / family)
    model = load_model(older / family / source)
    torch.testing.assert_close(model(ids)[0, -1], logits, rtol=0, atol=1e-5)
    assert model.generate([greedy[:4]], len(greedy) - 4, temperature=0) == [greedy]


@each_family
@torch.no_grad()
def test_export_loads_with_the_registered_classes(older: Path, family: str) -> None:
    ids, logits, greedy = expected(older / family)
    model = AutoModelForCausalLM.from_pretrained(older / family / "export")
    assert type(model).__name__ in fira.huggingface.__all__
    torch.testing.assert_close(model(ids).logits[0, -1], logits, rtol=0, atol=1e-5)
    assert model.generate(ids[:, :4], max_new_tokens=len(greedy) - 4, do_sample=False)[0].tolist() == greedy


@pytest.mark.slow
@torch.no_grad()
def test_export_computes_the_same_with_its_own_code_in_a_clean_process(older: Path, tmp_path: Path) -> None:
    folders = [older / family / "export" for family in FAMILIES] + [older / family / "stock" for family in STOCK]
    named = []
    for folder in folders:
        named.append(tmp_path / f"{folder.parent.name}-{folder.name}")
        named[-1].symlink_to(folder)
    found = run_isolated(tmp_path, *named)
    for folder, link in zip(folders, named, strict=True):
        ids, _, greedy = expected(folder.parent)
        logits = load_model(folder.parent / "checkpoint")(ids)[0, -1]
        results = torch.from_numpy(np.load(tmp_path / f"{link.name}.npy"))[-1]
        torch.testing.assert_close(results, logits, rtol=0, atol=1e-5 if folder.name == "stock" else 1e-6)
        assert found[link.name]["greedy"] == greedy


@each_family
def test_repeated_export_writes_equal_files(older: Path, family: str, tmp_path: Path) -> None:
    pairs = [("export", "fira")] + ([("stock", STOCK[family])] if family in STOCK else [])
    for folder, form in pairs:
        before, after = older / family / folder, export(older / family / "checkpoint", tmp_path / folder, form)
        data, now = ({path.name for path in folder.iterdir() if path.suffix != ".py"} for folder in (before, after))
        assert now == data | {"MODEL_CARD.md"}
        for name in data - {"model.safetensors", "generation_config.json", "config.json", TEMPLATE}:
            assert (after / name).read_bytes() == (before / name).read_bytes(), name
        older_config, config = (document(path / "config.json") for path in (before, after))
        older_shape, shape = older_config.pop("shape", {}), config.pop("shape", {})
        assert config == older_config
        assert {name: shape.pop(name) for name in older_shape} == older_shape
        defaults = to_document(type(load_model(before.parent / "checkpoint").config)())
        assert shape.items() <= defaults.items()  # options that are new since then
        older_chat, chat = (formatted_chat(path) for path in (before, after))  # the template now refuses tools
        assert chat == older_chat
        generation = [document(path / "generation_config.json") for path in (before, after)]
        assert generation[0].pop("max_new_tokens") > 0  # it overrode the max_length of a caller
        assert generation[1].pop("max_length") > 1
        assert generation[0] == generation[1]
        weights = [load_file(path / "model.safetensors") for path in (before, after)]
        assert weights[0].keys() == weights[1].keys()
        assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
