"""Auxiliary losses compared with their formulas."""

import math

import pytest
import torch

from fira.nn.moe.aux_losses import even_weights, load_balance, router_z, small_outputs
from fira.nn.moe.router import Routed
from fira.nn.moe.token_means import TokenMeans
from tests.fira.nn.moe.small_moe import LENGTHS


def test_load_balance_and_z_loss_equal_their_formulas() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 9, 4, dtype=torch.float64)
    routed = Routed(logits.topk(2).indices, logits.topk(2).values, logits)
    means = TokenMeans(torch.arange(9) < LENGTHS[:, None])
    for row, length in enumerate(LENGTHS.tolist()):
        p = logits[row, :length].exp() / logits[row, :length].exp().sum(1, keepdim=True)
        share = [(routed.experts[row, :length] == e).sum() / length for e in range(4)]
        expected = 4 * sum(f * p[:, e].mean() for e, f in enumerate(share))
        torch.testing.assert_close(load_balance(routed, logits, means)[row], expected)
        z = sum(math.log(sum(math.exp(v) for v in token)) ** 2 for token in logits[row, :length].tolist()) / length
        assert float(router_z(routed, logits, means)[row]) == pytest.approx(z)


def test_even_weights_and_small_outputs_equal_their_formulas() -> None:
    """Sums over tokens and experts in loops; the experts' outputs have two channels."""
    torch.manual_seed(1)
    logits, outputs = torch.randn(2, 9, 4, dtype=torch.float64), torch.randn(2, 9, 2, 2, dtype=torch.float64)
    routed = Routed(logits.topk(2).indices, logits.softmax(-1).topk(2).values, logits)
    means = TokenMeans(torch.arange(9) < LENGTHS[:, None])
    even, small = (loss(routed, lambda: outputs, means).tolist() for loss in (even_weights, small_outputs))
    for row, length in enumerate(LENGTHS.tolist()):
        weights, channels = [0.0] * 4, [[0.0, 0.0] for _ in range(4)]
        for t in range(length):
            for j in range(2):
                expert = int(routed.experts[row, t, j])
                weights[expert] += float(routed.weights[row, t, j]) / length
                for c in range(2):
                    channels[expert][c] += float(outputs[row, t, j, c]) / length
        assert even[row] == pytest.approx(sum((weight - 1 / 4) ** 2 for weight in weights))
        assert small[row] == pytest.approx(sum(x**2 for expert in channels for x in expert) / 8)
