"""Files assembled in memory equal those of safetensors; numbers that are not finite are found."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from fira.checkpoint.tensor_file import CHUNK, DTYPE_NAMES, TensorFile


def some_tensors() -> dict[str, torch.Tensor]:
    """Tensors of every dtype, transposed, empty and with 0 dimensions, whose names need escapes or several bytes."""
    tensors = {}
    for i, dtype in enumerate(DTYPE_NAMES):
        tensors[f'b{i}."é\n'] = torch.arange(7).to(dtype)
        tensors[f"z{i}"] = torch.arange(6).reshape(3, 2).to(dtype).t()
        tensors[f"a{i}"] = torch.tensor(1).to(dtype)
        tensors[f"c{i}"] = torch.empty(0, 3, dtype=dtype)
    return tensors


def test_bytes_are_those_of_safetensors(tmp_path: Path) -> None:
    file = TensorFile()
    for tensors in (some_tensors(), {"x": torch.ones(2)}, {}, some_tensors()):  # smaller and larger than the memory
        file.copy_from(tensors)
        record = file.write(tmp_path / "file")
        expected = save({name: t.contiguous() for name, t in tensors.items()}, metadata={"format": "pt"})
        assert (tmp_path / "file").read_bytes() == expected
        assert (record.size, record.sha256) == (len(expected), hashlib.sha256(expected).hexdigest())


def test_content_does_not_change_with_the_tensors(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    file = TensorFile()
    file.copy_from({"x": parameter})
    with torch.no_grad():
        parameter.zero_()
    file.write(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == save({"x": torch.ones(3)}, metadata={"format": "pt"})


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_first_tensor_that_is_not_finite_is_named(dtype: torch.dtype, bad: float) -> None:
    largest = torch.full((CHUNK + 3,), torch.finfo(dtype).max, dtype=dtype)
    tensors = {"z": largest, "y": largest.clone(), "a": largest.clone(), "n": torch.tensor([2**62])}
    file = TensorFile()
    file.copy_from(tensors)
    assert file.first_not_finite() is None
    for name in ("a", "y"):
        tensors[name][-1] = bad
        file.copy_from(tensors)
        assert file.first_not_finite() == name
