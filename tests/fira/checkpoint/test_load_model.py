"""Loading a model from a checkpoint."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.measure import peak_allocated
from fira import load_model
from fira.checkpoint.load_model import own_tokenizer
from fira.errors import UserError
from fira.huggingface.export_model import export
from fira.models.registry import to_document
from fira.nn.quantized_matrix import Int4Matrix, Int8Matrix
from tests.fira.checkpoint.test_merged_checkpoint import adapted
from tests.fira.huggingface.test_export_model import LLAMA
from tests.fira.small_model import CONFIG, make_model, make_tokenizer, save


def test_loaded_model_equals_the_saved_one(tmp_path: Path) -> None:
    run_folder = tmp_path / "run"
    save(run_folder, make_model(), {"tokenizer.json": make_tokenizer().to_str().encode()})
    tokens = torch.randint(300, (2, 12), generator=torch.Generator().manual_seed(0))
    for path in (run_folder, run_folder / "checkpoints", run_folder / "checkpoints" / "step-000007"):
        model = load_model(path)
        assert torch.equal(model(tokens), make_model()(tokens))
        assert model.config == CONFIG
        assert model.tokenizer.to_str() == make_tokenizer().to_str()
        assert not model.training
        assert all(p.requires_grad for p in model.parameters())


def test_missing_foreign_or_damaged_checkpoint_raises(tmp_path: Path) -> None:
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
    save(tmp_path / "damaged", make_model(), {})
    weights = next(tmp_path.glob("damaged/checkpoints/step-000007/model-*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match=weights.name):
        load_model(tmp_path / "damaged")


def test_damaged_checkpoint_is_replaced_by_the_one_before_it_unless_it_is_given(tmp_path: Path, caplog) -> None:
    root = save(tmp_path, make_model(), {}).parent
    damaged = root / "step-000008"
    shutil.copytree(root / "step-000007", damaged)  # its manifest is of step 7
    (root / "latest").write_text("step-000008\n")
    for path in (tmp_path, root):
        caplog.clear()
        assert torch.equal(load_model(path).layers[0].token.weight, make_model().layers[0].token.weight)
        (line,) = caplog.messages
        assert line.endswith("in the folder of another step; restore it; using step-000007 instead")
    with pytest.raises(UserError, match=r"step-000008/manifest\.json is the manifest of step 7"):
        load_model(damaged)


def test_model_without_tokenizer_raises_where_one_is_needed(tmp_path: Path) -> None:
    model = load_model(save(tmp_path, make_model(), {}))
    assert model.tokenizer is None
    with pytest.raises(UserError, match="the model has no tokenizer"):
        own_tokenizer(model)


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_quantised_model_from_a_checkpoint_of_adapters_an_export_and_a_llama(form: str, tmp_path: Path) -> None:
    """Loaded while quantising, and quantised in a plain loop over the loaded model, the weights are the same."""
    _, adapters = adapted(tmp_path, "fira", torch.float32)
    export(save(tmp_path / "trained", make_model(), {}), tmp_path / "exported")
    LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(tmp_path / "llama")
    for path in (adapters, tmp_path / "exported", tmp_path / "llama"):
        full, model = load_model(path).float(), load_model(path, quantize=form)
        matrix = Int8Matrix if form == "int8" else Int4Matrix
        weights, count = full.weights(), 0
        for name, module in model.named_modules():
            if isinstance(module, matrix):
                whole, _, expert = name.partition(".matrices.")
                weight = weights[whole][int(expert)] if expert else weights[f"{name.removesuffix('.matrix')}.weight"]
                for key, value in matrix(weight).named_buffers():
                    assert torch.equal(module.get_buffer(key), value), name
                count += 1
        assert count >= 2 * 6
        assert (model(torch.tensor([[1, 2, 3]])) - full(torch.tensor([[1, 2, 3]]))).abs().max() > 0


def test_loading_a_quantised_model_needs_the_memory_of_its_weights_and_one_matrix(tmp_path: Path) -> None:
    """As reported by torch's profiler. In fp32 the matrices have 10.2 MB, in 4 bits 1.6 MB."""
    config = replace(CONFIG, vocab_size=40, d_model=128, d_ff=512, num_layers=4)
    folder = save(tmp_path, make_model(config), {})
    model = load_model(folder, quantize="int4")  # imports and caches
    size, matrix = sum(weight.nbytes for weight in model.weights().values()), 4 * config.d_model * config.d_ff
    peak = peak_allocated(lambda: load_model(folder, quantize="int4"))
    assert size < peak < size + 8 * matrix
    whole = 4 * make_model(config).num_parameters()
    assert size + 8 * matrix < 0.4 * whole
    assert peak_allocated(lambda: load_model(folder)) > 0.95 * whole


def test_weights_that_cannot_be_quantised_and_other_devices_raise(tmp_path: Path) -> None:
    llama, folder = LlamaForCausalLM(LlamaConfig(**LLAMA)), tmp_path / "llama"
    with torch.no_grad():
        llama.model.layers[0].mlp.up_proj.weight[2, 3] = float("nan")
    llama.save_pretrained(folder)
    with pytest.raises(UserError, match=r"llama: layers\.1\.mlp\.w3\.weight has values that are not finite"):
        load_model(folder, quantize="int8")
    with pytest.raises(UserError, match="no quantisation 'int2'; give one of int8, int4"):
        load_model(folder, quantize="int2")
    with pytest.raises(UserError, match="int4 is for CPUs"):
        load_model(folder, "cuda", quantize="int4")
