"""The fused projection and cross-entropy compared with torch's cross_entropy of the logits."""

import pytest
import torch
import torch.nn.functional as F

from fira.nn.cross_entropy import LOGITS, linear_cross_entropy


@pytest.mark.parametrize("logits", [256 * 7, 2**20])
def test_linear_cross_entropy_equals_cross_entropy_of_logits(logits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One block, and several blocks of which the last is shorter; some targets are ignored."""
    monkeypatch.setitem(LOGITS, "cpu", logits)
    torch.manual_seed(0)
    targets = torch.randint(7, (600,))
    targets[::5] = -100
    leaves = [torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for n in (600, 7)]
    losses = [
        linear_cross_entropy(*leaves, targets),
        F.cross_entropy(leaves[0] @ leaves[1].T, targets, reduction="sum"),
    ]
    gradients = [torch.autograd.grad(0.3 * loss, leaves) for loss in losses]
    torch.testing.assert_close(*losses, rtol=1e-13, atol=0)
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    with torch.no_grad():
        assert linear_cross_entropy(*leaves, targets) == losses[0]
