"""Group relative policy optimisation (Shao et al. 2024, arXiv 2402.03300) with one update per batch of answers.

    o_1 … o_G    answers to the same prompt, sampled from the model
    r_i          reward of answer i, 0 or 1
    A_i          (r_i − mean of r) / (standard deviation of r + ε), over the G answers
    gradient     − mean over the answers of 1 / |o_i| Σ_t A_i ∇ log π(o_i,t)

This is the gradient of equation 3 of the paper without the KL term (β = 0). The model is the one that has sampled the
answers, so that the ratio of the probabilities is 1 and clipping has no effect.

Shapes: B sequences of T tokens in a micro-batch.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from fira.nn.linear_losses import linear_losses
from fira.nn.objective import Stored, log_probabilities
from fira.nn.projection import Projection

EPSILON = 1e-4


class PolicyGradient:
    """The gradient of GRPO. The reported loss is the mean of 1 − reward over the answers, the share of wrong ones.

    Arguments in `stored`: weights [B, T], 1 / |o| at the tokens of an answer, else 0; advantages [B, T], A at the same
    tokens; and by sequence [B], answers, their number, and wrong, the sum of 1 − r.
    metrics: the entropy of the distributions that the tokens were drawn from in nats, and the tokens of an answer.
    """

    metrics: tuple[str, ...] = ("entropy", "answer_tokens")

    def count(self, targets: np.ndarray, stored: Mapping[str, np.ndarray]) -> int:
        """The number of answers."""
        return int(stored["answers"].sum())

    def output(self, x: Tensor, projection: Projection, targets: Tensor, stored: Stored) -> Tensor:
        """[B, T, 2]: log-probability of each target, and entropy of its distribution; both 0 where it is ignored."""
        flat, counted = targets.flatten(), stored["weights"].flatten() > 0

        def numbers(logits: Tensor, rows: slice) -> Tensor:
            logs = logits.detach().log_softmax(-1)
            entropy = -(logs.exp() * logs).sum(-1) * counted[rows]
            return torch.stack([log_probabilities(logits, flat[rows]), entropy], 1)

        return linear_losses(x.flatten(0, 1), projection, numbers).view(*targets.shape, 2)

    def sums(self, output: Tensor, targets: Tensor, stored: Stored) -> tuple[Tensor, Tensor]:
        logs, entropy = output.unbind(-1)
        weights = stored["weights"].to(output.dtype)
        loss = -(weights * stored["advantages"].to(output.dtype) * logs).sum()
        numbers = [stored["wrong"].sum(), (weights * entropy).sum(), (weights > 0).sum()]
        return loss, torch.stack([number.detach().double() for number in numbers])

    def report_shape(self, sequences: int, length: int) -> tuple[int, ...]:
        return (1 + len(self.metrics),)


def advantages(rewards: np.ndarray) -> np.ndarray:
    """Rewards [G, n] of G answers to each of n prompts → their advantages [G, n]; 0 if G is 1."""
    if len(rewards) == 1:
        return np.zeros_like(rewards)
    return (rewards - rewards.mean(0)) / (rewards.std(0, ddof=1) + EPSILON)
