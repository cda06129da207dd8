"""One safetensors file as a checkpoint, with config and tokenizer in its metadata or next to it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fira import FIRA, load_model
from fira.checkpoint.load_model import saved_tokenizer
from fira.checkpoint.pretrained import open_saved
from fira.data.tokenizer import load_tokenizer
from fira.errors import UserError
from fira.huggingface.export_model import export
from fira.models.registry import build, to_document
from tests.fira.models.small_families import BLUES
from tests.fira.small_model import CONFIG, make_model, make_tokenizer, perturbed, save

IDS = torch.arange(12)[None]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    step = save(folder / "run", make_model(), {"tokenizer.json": make_tokenizer().to_str().encode()})
    return export(step, folder / "export")


@pytest.fixture
def single(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(exported / "model.safetensors", tmp_path / "ckpt-500.safetensors"))


def test_file_of_an_export_contains_config_and_tokenizer(
    single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(single)
    assert model.config == CONFIG
    assert torch.equal(model(IDS), make_model()(IDS))
    assert model.tokenizer.to_str() == make_tokenizer().to_str()
    assert model.tokenizer_config.eos_token == "</s>"
    assert model.tokenizer_config.chat_template
    monkeypatch.setenv("FIRA_CACHE", str(tmp_path / "cache"))
    stored = saved_tokenizer(open_saved(single))  # as a file, for --init
    assert load_tokenizer(stored).to_str() == make_tokenizer().to_str()
    assert json.loads(Path(stored).with_name("tokenizer_config.json").read_text())["eos_token"] == "</s>"


@pytest.mark.parametrize("prefix", ["", "model."])
def test_config_and_tokenizer_next_to_a_file(tmp_path: Path, prefix: str) -> None:
    weights = make_model().state_dict()
    save_file({f"{prefix}{name}": value for name, value in weights.items()}, tmp_path / "ckpt.safetensors")
    with pytest.raises(UserError, match=r"ckpt\.safetensors: no config\.json in its metadata or next to it"):
        load_model(tmp_path / "ckpt.safetensors")
    shape = to_document(CONFIG)
    document = {"model_type": "fira", "shape": shape} if prefix else shape
    (tmp_path / "config.json").write_text(json.dumps(document))
    make_tokenizer().save(str(tmp_path / "tokenizer.json"))
    model = load_model(tmp_path / "ckpt.safetensors")
    assert torch.equal(model(IDS), make_model()(IDS))
    assert model.tokenizer.get_vocab() == make_tokenizer().get_vocab()
    assert saved_tokenizer(open_saved(tmp_path / "ckpt.safetensors")) is not None


def test_hash_of_a_file_depends_on_weights_and_config(single: Path) -> None:
    before = open_saved(single).weights_hash()
    assert open_saved(single).weights_hash() == before
    content = bytearray(single.read_bytes())
    content[-1] ^= 1
    single.write_bytes(content)
    assert open_saved(single).weights_hash() != before


@pytest.mark.parametrize("name", ["model.pth", "model.pt", "model.bin"])
def test_pickle_is_refused_with_a_remedy(tmp_path: Path, name: str) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / name)
    with pytest.raises(UserError, match=rf"{name}: not a \.safetensors file; .*safetensors\.torch\.save_file"):
        load_model(tmp_path / name)


def test_part_of_a_checkpoint_is_refused(tmp_path: Path) -> None:
    step = save(tmp_path, make_model(), {})
    (part,) = step.glob("model-*.safetensors")
    with pytest.raises(UserError, match=r"a part of a checkpoint; give its folder .*step-000007"):
        load_model(part)


def test_damaged_file_is_named(single: Path) -> None:
    single.write_bytes(single.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"ckpt-500\.safetensors: "):
        load_model(single)


def test_model_loads_the_state_dict_of_an_export(exported: Path, tmp_path: Path) -> None:
    model = FIRA(CONFIG).eval()
    model.load_state_dict(load_file(exported / "model.safetensors"))
    assert torch.equal(model(IDS), make_model()(IDS))
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict({f"other.{name}": value for name, value in model.state_dict().items()})
    tied = perturbed(build(BLUES), 0.1).eval()
    save_file({f"model.{name}": value for name, value in tied.weights().items()}, tmp_path / "tied.safetensors")
    loaded = build(BLUES).eval()
    loaded.load_state_dict(load_file(tmp_path / "tied.safetensors"))
    assert torch.equal(loaded(IDS), tied(IDS))
