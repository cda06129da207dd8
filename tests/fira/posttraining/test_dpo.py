"""Losses and metrics of packed pairs against a loop over the pairs."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fira.nn.projection import Projection
from fira.posttraining.dpo import METRICS, PreferenceLoss
from fira.training.config import DPO_LOSSES

IGNORED, PAIRS, T = -100, 3, 14
# Two sequences: one pair, and two pairs with padding; the third one is padding of the batch, whose documents are 0.
DOCUMENTS = torch.tensor(
    [
        [0] * 6 + [1] * 8,
        [0] * 3 + [1] * 2 + [2] * 4 + [3] * 3 + [-1] * 2,
        [0] * 14,
    ]
)
ANSWERS = {(0, 0): [3, 4, 5], (0, 1): [9, 12], (1, 0): [2], (1, 1): [3], (1, 2): [6, 7, 8], (1, 3): [10, 11]}


def arguments(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Log-probabilities [3, T], targets, and stored tensors."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.full((3, T), IGNORED)
    for (row, _), positions in ANSWERS.items():
        targets[row, positions] = 5
    logs = -3 * torch.rand(3, T, generator=generator, dtype=dtype) * (targets != IGNORED)
    reference = torch.zeros(3, PAIRS, 2, dtype=torch.float64)
    for row, document in ANSWERS:
        reference[row, document // 2, document % 2] = -5 * torch.rand((), generator=generator)
    return logs, targets, {"documents": DOCUMENTS, "reference": reference}


def plain(loss: str, beta: float, logs: Tensor, reference: Tensor) -> list[float]:
    """The sums over pairs of loss and metrics."""
    sums = np.zeros(7)
    for row, pair in ((0, 0), (1, 0), (1, 1)):
        positions = [ANSWERS[row, 2 * pair + i] for i in (0, 1)]
        chosen, rejected = (float(logs[row, at].double().sum()) for at in positions)
        r_chosen, r_rejected = chosen - float(reference[row, pair, 0]), rejected - float(reference[row, pair, 1])
        mean_difference = r_chosen / len(positions[0]) - r_rejected / len(positions[1])
        value = {
            "sigmoid": -math.log(1 / (1 + math.exp(-beta * (r_chosen - r_rejected)))),
            "sigmoid-norm": -math.log(1 / (1 + math.exp(-beta * mean_difference))),
            "ipo": (mean_difference - 1 / (2 * beta)) ** 2,
        }[loss]
        rewards = beta * r_chosen, beta * r_rejected
        sums += [value, *rewards, rewards[0] > rewards[1], rewards[0] - rewards[1], chosen, rejected]
    return sums.tolist()


@pytest.mark.parametrize("beta", [0.1, 2.5])
@pytest.mark.parametrize("loss", DPO_LOSSES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sums_over_pairs_equal_those_of_a_loop(loss: str, beta: float, dtype: torch.dtype) -> None:
    logs, targets, stored = arguments(dtype)
    objective = PreferenceLoss(loss, beta)
    total, report = objective.sums(logs.requires_grad_(), targets, stored)
    expected = plain(loss, beta, logs.detach(), stored["reference"])
    assert report.tolist() == pytest.approx(expected, rel=1e-12)
    assert total.item() == report[0].item()
    assert report.shape == objective.report_shape(3, T)
    assert not report.requires_grad
    assert 0 < report[1 + METRICS.index("reward_accuracy")] < 3
    (gradient,) = torch.autograd.grad(total, logs)
    assert gradient[targets != IGNORED].all()


@pytest.mark.parametrize("loss", DPO_LOSSES)
def test_gradients_are_those_of_finite_differences(loss: str) -> None:
    logs, targets, stored = arguments()
    assert torch.autograd.gradcheck(
        lambda x: PreferenceLoss(loss, 0.4).sums(x * (targets != IGNORED), targets, stored)[0], logs.requires_grad_()
    )


def test_equal_models_have_the_loss_log_2_and_no_reward() -> None:
    logs, targets, stored = arguments()
    own = torch.zeros_like(stored["reference"]).flatten(1).scatter_add(1, DOCUMENTS.clamp(min=0), logs)
    stored["reference"] = own.view(3, PAIRS, 2)
    for loss in ("sigmoid", "sigmoid-norm"):
        _, report = PreferenceLoss(loss, 0.1).sums(logs, targets, stored)
        assert report[0].item() == pytest.approx(3 * math.log(2), rel=1e-15)
        assert report[1:5].tolist() == [0.0] * 4


def test_large_differences_neither_overflow_nor_lose_their_gradient() -> None:
    logs, targets, stored = arguments()
    stored["reference"] = stored["reference"] + torch.tensor([1e4, -1e4])
    total, _ = PreferenceLoss("sigmoid", 1.0).sums(logs.requires_grad_(), targets, stored)
    assert total.item() == pytest.approx(6e4, rel=1e-2)
    (gradient,) = torch.autograd.grad(total, logs)
    assert gradient[0, ANSWERS[0, 0]].tolist() == [-1.0] * 3


def test_count_is_the_number_of_pairs() -> None:
    documents = np.array([[0, 1, 2, 3, -1], [0, 0, 0, 1, 1], [-1] * 5])
    assert PreferenceLoss("sigmoid", 0.1).count(np.empty(0), {"documents": documents}) == 3


def test_output_is_the_log_probability_of_each_target() -> None:
    generator = torch.Generator().manual_seed(1)
    x, weight = torch.randn(2, 6, 4, generator=generator), torch.randn(9, 4, generator=generator)
    targets = torch.tensor([[1, 8, IGNORED, 0, 3, 2], [IGNORED] * 6])
    output = PreferenceLoss("ipo", 0.1).output(x, Projection(weight), targets, {})
    logs = (x @ weight.T).log_softmax(-1)
    for row in range(2):
        for t in range(6):
            target = int(targets[row, t])
            expected = logs[row, t, target].item() if target != IGNORED else 0.0
            assert output[row, t].item() == pytest.approx(expected, rel=1e-6)
