"""linear_losses against losses of the logits of all rows at once."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fira.nn.linear_losses import linear_losses
from fira.nn.objective import TokenScores
from fira.nn.projection import Projection

N, WIDTH, VOCABULARY = 700, 6, 11  # 700 rows are three blocks of 256


def tensors() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, WIDTH, generator=generator, dtype=torch.float64) for n in (N, VOCABULARY))
    targets = torch.randint(VOCABULARY, (N,), generator=generator)
    return x, weight, targets, torch.randn(N, generator=generator, dtype=torch.float64)


def nats(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets, reduction="none")


@pytest.mark.parametrize("softcap", [0.0, 1.5])
def test_losses_and_gradients_equal_those_of_all_logits(softcap: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(linear_losses.__globals__["row_blocks"].__globals__["LOGITS"], "cpu", 1)
    x, weight, targets, factors = tensors()
    results = []
    for blocks in (True, False):
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        if blocks:
            projection = Projection(leaves[1], softcap=softcap)
            losses = linear_losses(leaves[0], projection, lambda logits, rows: nats(logits, targets[rows]))
        else:
            logits = leaves[0] @ leaves[1].T
            losses = nats(softcap * torch.tanh(logits / softcap) if softcap else logits, targets)
        results.append((losses, *torch.autograd.grad(losses, leaves, factors)))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_columns_that_are_not_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two trained columns after four frozen ones."""
    monkeypatch.setitem(linear_losses.__globals__["row_blocks"].__globals__["LOGITS"], "cpu", 1)
    x, weight, targets, factors = tensors()
    leaves = x.clone().requires_grad_(), weight[:, 4:].clone().requires_grad_()
    projection = Projection(leaves[1], weight)
    losses = linear_losses(leaves[0], projection, lambda logits, rows: nats(logits, targets[rows]))
    gradients = torch.autograd.grad(losses, leaves, factors)
    expected = nats(leaves[0] @ torch.cat([weight[:, :4], leaves[1]], 1).T, targets)
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, leaves, factors), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_autocast_keeps_small_gradients(dtype: torch.dtype, tolerance: float) -> None:
    x, weight, targets, factors = (t.float() if t.is_floating_point() else t for t in tensors())
    gradients = []
    for enabled in (False, True):
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        with torch.autocast("cpu", dtype, enabled=enabled):
            projection = Projection(leaves[1])
            losses = linear_losses(leaves[0], projection, lambda logits, rows: nats(logits, targets[rows]))
        assert losses.dtype == torch.float32
        gradients.append(torch.autograd.grad(losses, leaves, factors * 1e-9))  # below the range of fp16
    for ours, expected in zip(gradients[1], gradients[0], strict=True):
        assert (ours - expected).norm() <= tolerance * expected.norm()


def test_token_scores_are_log_probabilities_and_whether_the_target_is_largest() -> None:
    x, weight, targets, _ = tensors()
    targets = targets.where(torch.arange(N) % 3 > 0, -100).view(7, 100)
    output = TokenScores().output(x.view(7, 100, WIDTH), Projection(weight), targets, {})
    logs = (x @ weight.T).log_softmax(-1).view(7, 100, VOCABULARY)
    trained = targets >= 0
    chosen = logs.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(output[..., 0], chosen * trained, rtol=1e-12, atol=1e-12)
    assert torch.equal(output[..., 1], ((logs.argmax(-1) == targets) & trained).double())
    assert 0 < output[..., 1].sum() < trained.sum()
