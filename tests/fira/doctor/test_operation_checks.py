"""Checks of single operations cover every fused kernel, and fail when an operation is wrong."""

import pkgutil
from importlib import import_module

import pytest
import torch

from fira.doctor import operation_checks
from fira.doctor.gpu_check import Target
from fira.doctor.operation_checks import NAMES, check_operation
from fira.nn import kernels
from tests.fira.nn.kernels.conftest import Interpreted

TARGET = Target("cpu", "", ())


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Interpreted:
    monkeypatch.setattr(operation_checks, "REPEATS", 1)
    monkeypatch.setattr(operation_checks, "SIZES", {"cpu": (6, 5)})
    return Interpreted(monkeypatch)


def kernel_names() -> set[str]:
    """The functions that are started as kernels, from the modules of fira/nn/kernels."""
    modules = [import_module(f"fira.nn.kernels.{module.name}") for module in pkgutil.iter_modules(kernels.__path__)]
    functions = [(module, value) for module in modules for value in vars(module).values() if hasattr(value, "fn")]
    return {
        f.fn.__name__ for m, f in functions if f.fn.__module__ == m.__name__ and "program_id" in f.fn.__code__.co_names
    }


def test_every_kernel_is_started_and_agrees(interpreted):
    """The fused forms of both sides are interpreted: that of the device is in fp32 and bf16, the reference in fp64."""
    for name in NAMES:
        assert "error" in interpreted(check_operation, TARGET, name)
    assert set(interpreted.launches) == kernel_names()


@pytest.mark.parametrize(
    ("name", "operation", "wrong"),
    [
        ("grouped product", "grouped_linear", lambda f: lambda x, groups, w, b: f(x, groups, w * 1.1, b)),
        ("grouped product", "grouped_linear", lambda f: lambda x, groups, w, b: f(x, groups, w, 2 * b - b.detach())),
        ("gated SiLU", "gated", lambda f: lambda activation, gate, a: f(activation, a, gate)),
        ("hash dropout", "token_keys", lambda f: lambda keys, start, length: f(keys, start, length).flip(-1)),
    ],
)
def test_a_wrong_value_or_gradient_on_the_device_is_found(monkeypatch, name, operation, wrong):
    plain, calls = getattr(operation_checks, operation), []

    def changed(*arguments):
        """Wrong for the device, which is prepared before the reference and does not compute in float64."""
        calls.append(arguments)
        floats = [a for a in arguments if torch.is_tensor(a) and a.is_floating_point()]
        is_reference = floats[0].dtype == torch.float64 if floats else len(calls) > 1
        return (plain if is_reference else wrong(plain))(*arguments)

    monkeypatch.setattr(operation_checks, operation, changed)
    with pytest.raises(AssertionError, match=f"{name}.*relative error"):
        check_operation(TARGET, name)


def test_integers_must_be_equal(monkeypatch):
    calls = []

    def bits(rows: torch.Tensor, columns: int) -> torch.Tensor:
        calls.append(columns)
        return torch.full((len(rows), columns), 2**30) + (len(calls) == 1)

    monkeypatch.setattr(operation_checks, "random_bits", bits)
    with pytest.raises(AssertionError, match="dropout bits"):
        check_operation(TARGET, "dropout bits")
