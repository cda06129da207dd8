"""Loading a model from a checkpoint."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fira import load_model
from fira.checkpoint.load_model import own_tokenizer
from fira.errors import UserError
from fira.models.registry import to_document
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
