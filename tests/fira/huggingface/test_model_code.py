"""The flat source code of an exported folder."""

from importlib import import_module
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_imports

from fira.huggingface import FiraLMConfig
from fira.huggingface.model_code import flat_sources
from tests.launch import ROOT


def test_modules_with_the_same_base_name_raise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = {
        "hub/configuration_fira": "from clashing.a.layer import x\nfrom clashing.b.layer import y",
        "a/layer": "x = 1",
        "b/layer": "y = 2",
    }
    for name, source in sources.items():
        path = tmp_path / "clashing" / f"{name}.py"
        path.parent.mkdir(parents=True)
        path.write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    import_module("clashing.hub.configuration_fira")
    with pytest.raises(ValueError, match=r"clashing\.\w\.layer and clashing\.\w\.layer have the same base name"):
        flat_sources("clashing.hub")


def test_config_is_saved_with_the_code_of_the_models(tmp_path: Path) -> None:
    FiraLMConfig().save_pretrained(tmp_path)
    sources = flat_sources("fira.huggingface")
    assert {path.name: path.read_text(encoding="utf-8") for path in tmp_path.glob("*.py")} == sources
    assert {"configuration_fira.py", "modeling_fira.py", "registry.py"} <= set(sources)
    assert not any("\nfrom fira." in source for source in sources.values())


def test_code_with_fused_kernels_does_not_require_triton() -> None:
    """The kernels are part of the code, though nothing imports them on a CPU; transformers does not demand Triton."""
    sources = flat_sources("fira.huggingface")
    kernels = {path.name for path in (ROOT / "fira/nn/kernels").glob("[a-z]*.py")}
    assert len(kernels) > 5
    assert kernels <= set(sources)
    for name in kernels:
        path = ROOT / "fira/nn/kernels" / name
        assert "triton" not in get_imports(path), f"{name} imports Triton outside of a try block"
