"""The fused projection and cross-entropy compared with torch's cross_entropy of the logits."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fira.nn.cross_entropy import LOGITS, linear_cross_entropy
from fira.nn.projection import Projection


@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("logits", [256 * 7, 2**20])
def test_linear_cross_entropy_equals_cross_entropy_of_logits(
    logits: int, softcap: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One block, and several blocks of which the last is shorter; some targets are ignored."""
    monkeypatch.setitem(LOGITS, "cpu", logits)
    torch.manual_seed(0)
    targets = torch.randint(7, (600,))
    targets[::5] = -100
    leaves = [torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for n in (600, 7)]
    projection = Projection(leaves[1], softcap=softcap)
    expected = leaves[0] @ leaves[1].T
    if softcap:
        expected = softcap * torch.tanh(expected / softcap)
    losses = [
        linear_cross_entropy(leaves[0], projection, targets),
        F.cross_entropy(expected, targets, reduction="sum"),
    ]
    gradients = [torch.autograd.grad(0.3 * loss, leaves) for loss in losses]
    torch.testing.assert_close(*losses, rtol=1e-13, atol=0)
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    with torch.no_grad():
        assert linear_cross_entropy(leaves[0], projection, targets) == losses[0]


class WeightGradients(TorchDispatchMode):
    """Records the shapes of the sums of products that are written in place, those of gradients of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if function is torch.ops.aten.addmm_.default:
            self.shapes.append(tuple(args[0].shape))
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("logits", [256 * 7, 2**20])
def test_columns_that_are_not_trained(logits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against cross_entropy of the logits. No product for the gradient of the frozen columns is computed."""
    monkeypatch.setitem(LOGITS, "cpu", logits)
    torch.manual_seed(0)
    targets = torch.randint(7, (600,))
    targets[::5] = -100
    frozen, trained = torch.randn(7, 4, dtype=torch.float64), torch.randn(7, 2, dtype=torch.float64, requires_grad=True)
    x = torch.randn(600, 6, dtype=torch.float64, requires_grad=True)
    whole = torch.cat([frozen, trained], 1)
    with WeightGradients() as gradients_of_weights:
        loss = linear_cross_entropy(x, Projection(trained, whole.detach()), targets)
    assert set(gradients_of_weights.shapes) == {(7, 2)}
    expected = F.cross_entropy(x @ whole.T, targets, reduction="sum")
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    gradients = (torch.autograd.grad(0.3 * part, (x, trained)) for part in (loss, expected))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)
