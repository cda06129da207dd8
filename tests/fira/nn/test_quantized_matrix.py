"""Quantised matrices against a loop over their elements, and bounds of their errors."""

import math

import pytest
import torch
from torch import Tensor

from fira.nn.quantized_matrix import GROUP, Int4Matrix, Int8Matrix, QuantizedMatrix

forms = pytest.mark.parametrize("form", [Int8Matrix, Int4Matrix])
SHAPES = [(5, 7), (33, 70), (16, 32), (48, 96), (130, 160)]


def bf16(value: float) -> float:
    return float(torch.tensor(value).to(torch.bfloat16))


def loop(weight: Tensor, form: type[QuantizedMatrix]) -> Tensor:
    """The values that a quantised matrix stands for, one element at a time."""
    result = torch.zeros_like(weight)
    for o, row in enumerate(weight.tolist()):
        if form is Int8Matrix:
            scale = bf16(max(map(abs, row)) / 127)
            result[o] = torch.tensor([max(-127, min(127, round(value / scale))) * scale for value in row])
            continue
        row = row + [0.0] * (-len(row) % GROUP)  # zeros are part of the last group
        for start in range(0, weight.shape[1], GROUP):
            group = row[start : start + GROUP]
            scale = bf16((max(group) - min(group)) / 15)
            middle = bf16(min(group) + 8 * scale)
            for i, value in enumerate(group[: weight.shape[1] - start]):
                q = max(0, min(15, round((value - middle) / scale) + 8))
                result[o, start + i] = (q - 8) * scale + middle
    return result


def elements(matrix: QuantizedMatrix) -> Tensor:
    """The values of a matrix by its products with unit vectors, which are rounded to bf16."""
    return matrix(torch.eye(matrix.in_features, dtype=torch.bfloat16)).T.float()


@forms
@pytest.mark.parametrize("shape", SHAPES)
def test_each_element_equals_that_of_a_loop(form: type[QuantizedMatrix], shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    matrix = form(weight)
    expected, step = loop(weight, form), weight.abs().max() / 127
    torch.testing.assert_close(elements(matrix), expected, rtol=2**-8, atol=float(step) * 2**-5)
    assert (elements(matrix) - weight).abs().max() > 0.3 * step


@forms
def test_errors_are_at_most_half_a_step(form: type[QuantizedMatrix]) -> None:
    """The step is that of the row in 8 bits, and that of the group in 4 bits; products of one element round to bf16."""
    weight = torch.randn(64, 8 * GROUP, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 2, 64)[:, None]
    if form is Int8Matrix:
        step = weight.abs().amax(1, keepdim=True).expand_as(weight) / 127
    else:
        groups = weight.unflatten(1, (-1, GROUP))
        step = ((groups.amax(2) - groups.amin(2)) / 15).repeat_interleave(GROUP, 1)
    error = (elements(form(weight)) - weight).abs()
    # 127 steps, or 15, of a scale that is rounded by at most 2^-9; and a value rounded to bf16 by the same share.
    slack = step * (127 if form is Int8Matrix else 15) * 2**-9 + weight.abs() * 2**-8
    assert (error <= step / 2 + slack).all()
    assert error.mean() > 0.2 * step.mean()
    assert error.mean() < 0.3 * step.mean() + slack.mean()


@forms
def test_constant_and_zero_rows_are_exact(form: type[QuantizedMatrix]) -> None:
    weight = torch.tensor([0.0, 3.0, -127.0, 2.0**-30])[:, None].repeat(1, 2 * GROUP)
    torch.testing.assert_close(elements(form(weight)), weight, rtol=2**-8, atol=0)


@forms
@pytest.mark.parametrize("shape", SHAPES)
def test_product_of_a_row_does_not_depend_on_other_rows(form: type[QuantizedMatrix], shape: tuple[int, int]) -> None:
    torch.manual_seed(2)
    matrix, x = form(torch.randn(shape)), torch.randn(19, shape[1]).to(torch.bfloat16)
    y = matrix(x)
    exact = x.double() @ elements(matrix).double().T
    torch.testing.assert_close(y.double(), exact, rtol=2**-7, atol=float(exact.abs().max()) * 2**-7)
    assert torch.equal(y, torch.cat([matrix(row[None]) for row in x]))
    assert matrix(x[:0]).shape == (0, shape[0])


@pytest.mark.parametrize(("form", "bits"), [(Int8Matrix, 8 + 16 / 96), (Int4Matrix, 4 + 32 / GROUP)])
def test_bits_per_element(form: type[QuantizedMatrix], bits: float) -> None:
    matrix = form(torch.randn(48, 96))
    size = sum(buffer.nbytes for buffer in matrix.buffers())
    assert math.isclose(8 * size / (48 * 96), bits)
    assert not matrix.state_dict()
