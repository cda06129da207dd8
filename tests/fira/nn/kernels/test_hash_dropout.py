"""Fused hash dropout is bitwise identical to the plain form."""

import pytest
import torch

from fira.nn.dropout import Dropout, token_keys

KEYS = torch.randint(-(2**62), 2**62, (3,), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 7, 37), (3, 1, 1), (3, 5, 1030), (3, 0, 8)])
def test_values_and_gradients_are_bitwise_identical(compare, shape, dtype) -> None:
    rows = token_keys(KEYS, 2, shape[1])
    for p in (0.1, 0.7):
        dropout = Dropout(p, "layers.3.dropout1")
        x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
        compare(lambda x, d=dropout: d(x, rows), x)


def test_one_kernel_in_each_direction_and_only_the_row_keys_are_saved(compare, interpreted) -> None:
    dropout, rows = Dropout(0.5, "here"), token_keys(KEYS, 0, 5)
    x = torch.randn(3, 5, 16)
    assert compare(lambda x: dropout(x, rows), x) == ["_dropout"] * 2
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape), lambda t: t):
        interpreted(dropout, x.requires_grad_(), rows)
    assert saved == [rows.shape]


def test_values_in_transposed_memory(compare) -> None:
    dropout, rows = Dropout(0.5, "here"), token_keys(KEYS, 0, 8)
    compare(lambda x: dropout(x.transpose(1, 2), rows), torch.randn(3, 9, 8))


@pytest.mark.parametrize(("start", "length"), [(0, 40), (13, 1), (7, 700)])
def test_token_keys_are_bitwise_identical(interpreted, start: int, length: int) -> None:
    assert torch.equal(interpreted(token_keys, KEYS, start, length), token_keys(KEYS, start, length))
    assert interpreted.launches == ["_token_keys"]


def test_double_precision_uses_the_plain_form(compare) -> None:
    dropout, rows = Dropout(0.5, "here"), token_keys(KEYS, 0, 5)
    assert compare(lambda x: dropout(x, rows), torch.randn(3, 5, 16, dtype=torch.float64)) == []
