"""Fused gather of rows for experts, and weighted sum of their outputs, against the plain forms."""

import pytest
import torch

from fira.nn.moe.permutation import gather_rows, sort_by_expert, weighted_sum

SHAPES = [(5, 2, 37), (9, 1, 8), (2, 3, 1100), (64, 4, 16)]  # tokens, experts per token, width


def permutation(tokens: int, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    experts = torch.rand(tokens, 6, generator=torch.Generator().manual_seed(tokens)).topk(top_k).indices
    return sort_by_expert(experts.flatten())


@pytest.mark.parametrize(("tokens", "top_k", "width"), SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_gather(compare, tokens, top_k, width, dtype, tolerance) -> None:
    order, inverse = permutation(tokens, top_k)
    x = torch.randn(tokens, width).to(dtype)
    launches = compare(lambda x: gather_rows(x, order, inverse, top_k), x, rtol=tolerance, atol=tolerance)
    assert launches == (["_gather", "_combine"] if top_k > 1 else [])  # one copy: index_select is one kernel as well


@pytest.mark.parametrize(("tokens", "top_k", "width"), SHAPES)
@pytest.mark.parametrize(
    ("rows_dtype", "weights_dtype", "tolerance"),
    [
        (torch.float32, torch.float32, 1e-5),
        (torch.bfloat16, torch.float32, 2e-2),  # under autocast
        (torch.float16, torch.float32, 2e-3),
        (torch.bfloat16, torch.bfloat16, 1e-1),  # the plain form rounds products before it sums them
    ],
)
def test_weighted_sum(compare, tokens, top_k, width, rows_dtype, weights_dtype, tolerance) -> None:
    order, inverse = permutation(tokens, top_k)
    rows = (torch.randn(tokens * top_k, width) / width**0.5).to(rows_dtype)
    weights = torch.rand(tokens, top_k).to(weights_dtype)
    launches = compare(lambda *x: weighted_sum(*x, order, inverse), rows, weights, rtol=tolerance, atol=tolerance)
    assert launches == ["_combine", "_combine_backward"]


def test_inference_needs_one_kernel(interpreted) -> None:
    order, inverse = permutation(5, 2)
    with torch.no_grad():
        x, rows, weights = torch.randn(5, 8), torch.randn(10, 8), torch.rand(5, 2)
        torch.testing.assert_close(interpreted(gather_rows, x, order, inverse, 2), gather_rows(x, order, inverse, 2))
        expected = weighted_sum(rows, weights, order, inverse)
        torch.testing.assert_close(interpreted(weighted_sum, rows, weights, order, inverse), expected)
    assert interpreted.launches == ["_gather", "_combine"]
