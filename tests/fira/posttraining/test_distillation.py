"""Divergences between teacher and student against those of all logits."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fira.nn.projection import Projection
from fira.posttraining.distillation import IDS, LOGS, Distillation, TeacherTokens

B, T, WIDTH, V = 2, 5, 6, 11


def tensors(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((B, T, WIDTH), (V, WIDTH)))


TARGETS = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(2)).where(torch.arange(T) != 1, -100)


def taught(k: int, temperature: float) -> dict[str, Tensor]:
    x, weight = tensors(0)
    report = TeacherTokens(k, temperature).output(x, Projection(weight), TARGETS, {})
    return {IDS: report[..., :k].long(), LOGS: report[..., k:]}


def generalized_jsd(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """As in the paper, from probabilities [N, n]."""
    p, q = teacher.exp(), student.exp()
    if beta in (0, 1):
        first, second = (p, q) if beta == 0 else (q, p)
        return (first * (first / second).log()).sum(-1)
    m = beta * p + (1 - beta) * q
    return beta * (p * (p / m).log()).sum(-1) + (1 - beta) * (q * (q / m).log()).sum(-1)


@pytest.mark.parametrize("beta", [0.0, 1.0, 0.3])
@pytest.mark.parametrize("k", [3, V])
def test_losses_and_gradients_equal_those_of_the_events(k: int, beta: float) -> None:
    temperature, results = 1.7, []
    stored = taught(k, temperature)
    teacher_x, teacher_weight = tensors(0)
    for ours in (True, False):
        x, weight = (t.requires_grad_() for t in tensors(1))
        if ours:
            objective = Distillation(beta, temperature)
            loss, report = objective.sums(objective.output(x, Projection(weight), TARGETS, stored), TARGETS, stored)
        else:
            trained = TARGETS.flatten() >= 0
            logits: Any = [(a @ b.T).flatten(0, 1)[trained] for a, b in ((x, weight), (teacher_x, teacher_weight))]
            events = []
            top = logits[1].topk(k).indices
            for z in logits:
                p = (z / temperature).softmax(-1)
                tail = 1 - p.gather(1, top).sum(1, keepdim=True)
                events.append(torch.cat([p.gather(1, top), *([tail] if k < V else [])], 1).log())
            loss = generalized_jsd(*events, beta).sum()
            nats = F.cross_entropy(logits[0], TARGETS.flatten()[trained], reduction="sum")
            report = torch.stack([loss, nats]).detach()
        results.append((loss, report, *torch.autograd.grad(loss, (x, weight))))
    for value, expected in zip(*results, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)


def test_divergence_of_the_teacher_from_itself_is_zero() -> None:
    x, weight = tensors(0)
    objective = Distillation(0.0, 1.0)
    loss, _ = objective.sums(objective.output(x, Projection(weight), TARGETS, taught(4, 1.0)), TARGETS, taught(4, 1.0))
    assert abs(loss) < 1e-12
    assert objective.count(TARGETS.numpy(), {}) == B * (T - 1)
