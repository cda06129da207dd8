"""Fused cross-entropy in blocks against the plain form and against torch's cross_entropy."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fira.nn.cross_entropy import FP16_SCALE, LOGITS, linear_cross_entropy
from fira.nn.projection import Projection


def inputs(rows: int, vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(rows, 6, generator=generator), torch.randn(vocab, 6, generator=generator)
    targets = torch.randint(vocab, (rows,), generator=generator)
    targets[::3] = -100
    targets[-1] = vocab - 1
    return x, weight, targets


@pytest.mark.parametrize(("rows", "vocab"), [(5, 7), (3, 5000), (300, 16)])
def test_loss_and_gradients(compare, rows: int, vocab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOGITS, "cpu", 256 * vocab)  # 300 rows: two blocks
    x, weight, targets = inputs(rows, vocab)
    for softcap in (0.0, 2.0):

        def loss(x: Tensor, weight: Tensor, softcap: float = softcap) -> Tensor:
            return linear_cross_entropy(x, Projection(weight, softcap=softcap), targets)

        launches = compare(loss, x, weight, rtol=1e-5, atol=1e-5)
        assert launches == ["_softmax_loss"] * (1 + (rows > 256))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_under_autocast(compare, dtype: torch.dtype, tolerance: float) -> None:
    x, weight, targets = inputs(5, 40)

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype):
            return linear_cross_entropy(x, Projection(weight), targets)

    assert compare(loss, x, weight, rtol=tolerance, atol=tolerance) == ["_softmax_loss"]


def test_without_gradients(interpreted) -> None:
    x, weight, targets = inputs(5, 40)
    expected = F.cross_entropy(x @ weight.T, targets, reduction="sum")
    torch.testing.assert_close(interpreted(linear_cross_entropy, x, Projection(weight), targets), expected)


@pytest.mark.parametrize("fused", [False, True])
def test_small_gradients_survive_in_fp16(interpreted, fused: bool) -> None:
    """Entries below 3e-8, which is zero in fp16: the loss scale applied to the result could not restore them."""
    torch.manual_seed(0)
    x, weight = torch.ones(64, 8), torch.randn(32, 8) * 0.1
    weight[5:] -= 2.4  # probabilities of about 1e-9
    targets = torch.randint(5, (64,))
    leaves = [x.requires_grad_(), weight.requires_grad_()]

    def gradients() -> tuple[Tensor, ...]:
        with torch.autocast("cpu", torch.float16):
            loss = linear_cross_entropy(leaves[0], Projection(leaves[1]), targets)
        return torch.autograd.grad(loss, leaves, torch.tensor(65536 / 64))

    found = interpreted(gradients) if fused else gradients()
    low = [x.half().double().detach().requires_grad_() for x in leaves]  # as the products see them
    expected = torch.autograd.grad(
        F.cross_entropy(low[0] @ low[1].T, targets, reduction="sum"), low, torch.tensor(65536 / 64).double()
    )
    assert expected[1][5:].abs().max() / 1024 / 64 < 3e-8
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=2e-2, atol=1e-3 * float(other[:5].abs().max()))
    torch.testing.assert_close(found[1][5:].double(), expected[1][5:], rtol=2e-2, atol=1e-9)


@pytest.mark.parametrize("fused", [False, True])
def test_sums_beyond_the_range_of_fp16_stay_finite(interpreted, fused: bool) -> None:
    """The scaled gradient of a weight, a sum over rows, would overflow if it were in fp16."""
    x, weight = torch.full((32, 4), 3.0).requires_grad_(), torch.zeros(4, 4).requires_grad_()
    targets = torch.zeros(32, dtype=torch.int64)

    def gradient() -> tuple[Tensor, ...]:
        with torch.autocast("cpu", torch.float16):
            return torch.autograd.grad(linear_cross_entropy(x, Projection(weight), targets), (weight,))

    (grad,) = interpreted(gradient) if fused else gradient()
    assert torch.finfo(torch.float16).max < 32 * 0.75 * 3 * FP16_SCALE
    torch.testing.assert_close(grad[0], torch.full((4,), -32 * 0.75 * 3.0))


def test_low_precision_weights_get_gradients_of_their_dtype(compare) -> None:
    x, weight, targets = inputs(5, 40)
    for dtype, tolerance in ((torch.float16, 1e-2), (torch.bfloat16, 0.1)):
        compare(
            lambda x, w: linear_cross_entropy(x, Projection(w), targets),
            x.to(dtype),
            weight.to(dtype),
            rtol=tolerance,
            atol=tolerance,
        )
