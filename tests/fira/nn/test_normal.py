"""Hash-based normal random numbers."""

import math

import torch

from fira.nn.dropout import normal, token_keys


def test_normal_has_the_moments_of_the_normal_distribution() -> None:
    """The first four moments, and no correlation between columns or rows, each within five deviations."""
    x = normal(token_keys(torch.arange(2000) * 2**40 + 7, 0, 50).flatten(), 4)
    n = x.numel()
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float(x.pow(power).mean()) - mean) < 5 * math.sqrt(variance / n), power
    for a, b in ((x[:, 0], x[:, 1]), (x[:-1, 2], x[1:, 2]), (x[:-50, 3], x[50:, 3])):
        assert abs(float((a * b).mean())) < 5 / math.sqrt(len(a))
