"""Files in GGUF: read by the package gguf and by transformers, and compared with the export to transformers."""

import gc
import sys
import tracemalloc
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from fira import load_model
from fira.commands.export import main
from fira.data.tokenizer_config import CHAT_TEMPLATE
from fira.errors import UserError
from fira.huggingface import gguf_tensors
from fira.huggingface.export_model import export
from fira.nn.context import Context
from tests.fira.huggingface.gguf_models import CONFIGS, MOOSHAK, OLMOE, TEXT, save
from tests.fira.models import small_families, small_fira

TYPES = ("f16", "q8_0", "q4_0")
IDS = torch.randint(310, (2, 48), generator=torch.Generator().manual_seed(1))
# Largest error relative to the largest value of a block: half a step of 1/127, or a whole one of 1/8 where the largest
# value has the other sign; and the rounding of the step to fp16.
STEPS = {"Q8_0": 0.57 / 127, "Q4_0": 1.01 / 8}


def reader(folder: Path, kind: str) -> gguf.GGUFReader:
    return gguf.GGUFReader(folder / f"{folder.name}-{kind.upper()}.gguf")


def expected_tensors(folder: Path, config: Any) -> dict[str, Tensor]:
    """The tensors of an export to transformers by the names that the package gguf maps them to."""
    arch = gguf.MODEL_ARCH.OLMOE if hasattr(config, "num_experts") else gguf.MODEL_ARCH.LLAMA
    names = gguf.get_tensor_name_map(arch, config.num_layers)
    tensors = {}
    for name, value in AutoModelForCausalLM.from_pretrained(folder).state_dict().items():
        parts = {name: value}
        if name.endswith("gate_up_proj"):
            halves = zip(("gate_proj", "up_proj"), value.chunk(2, dim=1), strict=True)
            parts = {name.replace("gate_up_proj", half): part for half, part in halves}
        for part, tensor in parts.items():
            stored = names.get_name(part, try_suffixes=(".weight",)) or names.get_name(f"{part}.weight", (".weight",))
            assert stored, part
            tensors[stored.removesuffix(".weight") + ".weight"] = tensor
    if getattr(config, "tied", False):
        del tensors["output.weight"]
    return tensors


def as_rotated_by_transformers(name: str, values: np.ndarray, config: Any) -> np.ndarray:
    """Put the rows of q and k of a llama, in which the channels 2i and 2i + 1 are rotated, into halves of each head."""
    heads = {"attn_q": config.n_head, "attn_k": config.n_kv_head or config.n_head}.get(name.split(".")[-2])
    if heads is None or hasattr(config, "num_experts"):
        return values
    width = len(values) // heads
    order = [head * width + channel for head in range(heads) for channel in (*range(0, width, 2), *range(1, width, 2))]
    return values[order]


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_tensor_equals_the_export_to_transformers(name: str, kind: str, tmp_path: Path) -> None:
    config, form = CONFIGS[name], name.partition("-")[0]
    step = save(tmp_path / "run", config)
    expected = expected_tensors(export(step, tmp_path / "stock", form), config)
    file = reader(export(step, tmp_path / "out", "gguf", kind), kind)
    tensors = {tensor.name: tensor for tensor in file.tensors}
    assert tensors.keys() - {"rope_freqs.weight"} == expected.keys()
    assert ("rope_freqs.weight" in tensors) == (name == "llama-stretched")
    for key, value in expected.items():
        tensor = tensors[key]
        ends = key in ("token_embd.weight", "output.weight")
        whole = value.dim() == 1 or "ffn_gate_inp" in key
        stored = "F32" if whole else "Q8_0" if ends and kind == "q4_0" else kind.upper()
        assert tensor.tensor_type.name == stored, key
        found = dequantize(tensor.data, tensor.tensor_type)
        assert (*reversed(tensor.shape.tolist()),) == found.shape == tuple(value.shape)
        found = as_rotated_by_transformers(key, found, config)
        if stored in ("F32", "F16"):
            assert np.array_equal(found, value.half().float().numpy() if stored == "F16" else value.numpy()), key
        else:
            blocks = value.reshape(-1, 32).numpy()
            error = np.abs(found.reshape(-1, 32) - blocks).max(1)
            assert (error <= STEPS[stored] * np.abs(blocks).max(1)).all(), key


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_transformers_reads_model_and_tokenizer(name: str, tmp_path: Path) -> None:
    """It cannot read olmoe, nor the frequencies of a stretched rotary embedding."""
    step = save(tmp_path / "run", CONFIGS[name])
    folder = export(step, tmp_path / "out", "gguf")
    model, ours = AutoModelForCausalLM.from_pretrained(folder, gguf_file="out-F16.gguf").eval(), load_model(step)
    torch.testing.assert_close(model(IDS).logits, ours(IDS, Context()), rtol=0, atol=0.02)
    assert ours(IDS, Context()).abs().max() > 2
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file="out-F16.gguf")
    assert tokenizer(TEXT)["input_ids"] == ours.tokenizer.encode(TEXT).ids
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<s>", "</s>", "[UNK]")
    assert tokenizer.chat_template == CHAT_TEMPLATE


def test_metadata(tmp_path: Path) -> None:
    folder = export(save(tmp_path / "run", OLMOE), tmp_path / "out", "gguf", "q4_0")
    assert {path.name for path in folder.iterdir()} == {"out-Q4_0.gguf", "MODEL_CARD.md"}
    assert "library_name: gguf" in (folder / "MODEL_CARD.md").read_text()
    fields = {key: field.contents() for key, field in reader(folder, "q4_0").fields.items()}
    expected = {
        "general.architecture": "olmoe",
        "general.file_type": 2,
        "olmoe.context_length": 64,
        "olmoe.embedding_length": 64,
        "olmoe.feed_forward_length": 96,
        "olmoe.block_count": 2,
        "olmoe.attention.head_count": 4,
        "olmoe.attention.head_count_kv": 4,
        "olmoe.attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
        "olmoe.rope.freq_base": 1e4,
        "olmoe.expert_count": 6,
        "olmoe.expert_used_count": 2,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }
    assert {key: fields[key] for key in expected} == expected
    assert len(fields["tokenizer.ggml.tokens"]) == len(fields["tokenizer.ggml.token_type"]) == 320
    assert fields["tokenizer.ggml.token_type"][:6] == [3, 3, 3, 3, 3, 1]
    assert fields["tokenizer.ggml.token_type"][-10:] == [5] * 10


FAMILIES = {
    "a fira": (small_fira.CONFIG, "fira"),
    "a blues": (small_families.BLUES, "fira"),
    "a microrwkv": (small_families.MICRORWKV, "fira"),
    "norm_order=post": (replace(OLMOE, norm_order="post"), "flexolmo"),
    "max_position=32": (replace(OLMOE, max_position=32), "olmoe"),
    "n_kv_head=2": (replace(OLMOE, n_kv_head=2), "olmoe"),
    "softcap=30.0": (replace(MOOSHAK, softcap=30.0), "fira"),
    "qk_norm=True": (replace(MOOSHAK, qk_norm=True), "fira"),
    "relu_squared=True": (replace(MOOSHAK, relu_squared=True), "fira"),
    "value_embeddings=True": (replace(OLMOE, value_embeddings=True), "fira"),
    "residual_scalars=True": (replace(OLMOE, residual_scalars=True), "fira"),
}


@pytest.mark.parametrize("named", FAMILIES)
def test_model_without_equivalent_names_the_format_to_use(named: str, tmp_path: Path) -> None:
    config, form = FAMILIES[named]
    step = save(tmp_path / "run", config)
    with pytest.raises(UserError, match=f"^--format gguf: .*{named}[ ;].*export with --format {form}$"):
        export(step, tmp_path / "out", "gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_widths_that_do_not_fill_blocks_are_refused(tmp_path: Path) -> None:
    step = save(tmp_path / "run", replace(MOOSHAK, d_model=56, d_ff=100))
    message = "d_model 56 and d_ff 100 must be a multiple of 32; train with --model-set d_model=64,d_ff=128,"
    with pytest.raises(UserError, match=f"--type q8_0: {message}"):
        export(step, tmp_path / "out", "gguf", "q8_0")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert export(step, tmp_path / "out", "gguf", "f16").is_dir()


def test_values_beyond_fp16_are_refused(tmp_path: Path) -> None:
    step = save(tmp_path / "run", MOOSHAK, scale=1e5)
    with pytest.raises(UserError, match=r"token_embd.weight: a value of .*e\+05 is beyond fp16"):
        export(step, tmp_path / "out", "gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert export(step, tmp_path / "out", "gguf", "q8_0").is_dir()


def test_command_names_the_program_that_runs_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step, out = save(tmp_path / "run", MOOSHAK), tmp_path / "small"
    main(["--checkpoint", str(step), "--out", str(out), "--format", "gguf", "--type", "q8_0"])
    assert capsys.readouterr().out == f"next: llama-cli -m {out}/small-Q8_0.gguf\n"
    with pytest.raises(UserError, match="--type is for --format gguf"):
        main(["--checkpoint", str(step), "--out", str(out), "--type", "q8_0"])


@pytest.fixture
def live_bytes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The bytes of all weights in memory, and those that Python and numpy have allocated, after each weight is read."""
    tensors: weakref.WeakSet[Tensor] = weakref.WeakSet()
    sums: list[int] = []
    read = gguf_tensors.read_weight

    def counted(*arguments: Any) -> Tensor:
        value = read(*arguments)
        tensors.add(value)
        sums.append(sum(tensor.nbytes for tensor in tensors) + tracemalloc.get_traced_memory()[1] - before)
        tracemalloc.reset_peak()
        return value

    monkeypatch.setattr(gguf_tensors, "read_weight", counted)
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    yield sums
    tracemalloc.stop()


@pytest.mark.parametrize("config", [MOOSHAK, replace(OLMOE, num_experts=16)], ids=["llama", "olmoe"])
def test_memory_is_that_of_one_layer(config: Any, live_bytes: list[int], tmp_path: Path) -> None:
    config = replace(config, num_layers=12, d_model=256, d_ff=256)
    export(save(tmp_path / "run", config), tmp_path / "out", "gguf")
    layer = 4 * config.d_model * (3 * config.d_ff * getattr(config, "num_experts", 1) + 4 * config.d_model)
    assert max(live_bytes[1:]) < layer + 2**20  # and what was allocated before, such as the tokenizer


def test_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = save(tmp_path / "run", MOOSHAK)
    for module in [name for name in sys.modules if name.startswith("fira.huggingface.gguf_")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"needs the package gguf; pip install -e '\.\[gguf\]'"):
        export(step, tmp_path / "out", "gguf")
