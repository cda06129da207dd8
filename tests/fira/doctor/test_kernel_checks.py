"""Checks of single operations must fail when an operation is wrong."""

import pytest
import torch

from fira.doctor import kernel_checks
from fira.doctor.gpu_check import Target

TARGET = Target("cpu", "", ())


def test_a_wrong_product_is_found(monkeypatch):
    plain = kernel_checks.grouped_linear
    monkeypatch.setattr(kernel_checks, "grouped_linear", lambda x, groups, w, b: plain(x, groups, w * 1.1, b))
    with pytest.raises(AssertionError, match="64 → 128, ragged False: relative error"):
        kernel_checks.grouped_product(TARGET)


def test_a_wrong_gradient_of_the_bias_is_found(monkeypatch):
    plain = kernel_checks.grouped_linear
    monkeypatch.setattr(
        kernel_checks, "grouped_linear", lambda x, groups, w, b: plain(x, groups, w, 2 * b - b.detach())
    )
    with pytest.raises(AssertionError, match="relative error"):
        kernel_checks.grouped_product(TARGET)


def test_different_bits_are_counted(monkeypatch):
    calls: list[int] = []

    def bits(rows: torch.Tensor, columns: int) -> torch.Tensor:
        calls.append(columns)
        result = torch.zeros(*rows.shape, columns, dtype=torch.int32)
        result[0, 0, :2] = len(calls)
        return result

    monkeypatch.setattr(kernel_checks, "random_bits", bits)
    with pytest.raises(AssertionError, match="2 of 184200 values differ"):
        kernel_checks.dropout_bits(TARGET)
