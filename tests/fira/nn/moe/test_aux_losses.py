"""Auxiliary losses compared with their formulas."""

import math

import pytest
import torch

from fira.nn.moe.aux_losses import load_balance, router_z
from fira.nn.moe.router import Routed
from tests.fira.nn.moe.small_moe import LENGTHS


def test_load_balance_and_z_loss_equal_their_formulas() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 9, 4, dtype=torch.float64)
    routed = Routed(logits.topk(2).indices, logits.topk(2).values, logits)
    valid = torch.arange(9) < LENGTHS[:, None]
    for row, length in enumerate(LENGTHS.tolist()):
        p = logits[row, :length].exp() / logits[row, :length].exp().sum(1, keepdim=True)
        share = [(routed.experts[row, :length] == e).sum() / length for e in range(4)]
        expected = 4 * sum(f * p[:, e].mean() for e, f in enumerate(share))
        torch.testing.assert_close(load_balance(routed, logits, valid)[row], expected)
        z = sum(math.log(sum(math.exp(v) for v in token)) ** 2 for token in logits[row, :length].tolist()) / length
        assert float(router_z(routed, logits, valid)[row]) == pytest.approx(z)
