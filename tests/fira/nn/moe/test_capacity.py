"""The capacity limit of experts."""

import math

import pytest
import torch

from fira.nn.moe.capacity import within_capacity
from tests.fira.nn.moe.small_moe import LENGTHS, make_moe, training


@pytest.mark.parametrize("factor", [0.3, 1.0, 5.0])
def test_earlier_assignments_are_accepted_first(factor: float) -> None:
    torch.manual_seed(0)
    experts = torch.randn(2, 9, 4).topk(2).indices
    accepted = within_capacity(experts, torch.arange(9) < LENGTHS[:, None], 4, factor)
    for row, length in enumerate(LENGTHS.tolist()):
        free = [math.ceil(factor * 2 * length / 4)] * 4
        for t in range(9):
            for choice, e in enumerate(experts[row, t].tolist()):
                fits = t < length and free[e] > 0
                free[e] -= fits
                assert bool(accepted[row, t, choice]) == fits


def test_capacity_is_causal() -> None:
    moe, x = make_moe(0.5), torch.randn(1, 9, 6, dtype=torch.float64)
    before = moe(x, training(torch.tensor([9])), None)
    for t in range(9):
        changed = x.clone()
        changed[0, t] = torch.randn(6, dtype=torch.float64)
        after = moe(changed, training(torch.tensor([9])), None)
        torch.testing.assert_close(after[0, :t], before[0, :t], rtol=1e-12, atol=1e-12)
