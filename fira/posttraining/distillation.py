"""Distillation: the student's distribution of the next token approaches that of a teacher with the same tokenizer.

The teacher's distribution is reduced to its k most probable tokens and the mass of all others, the tail:

    p    softmax(z_teacher / τ)      p_1 … p_k, and p_tail = Σ p of the other tokens
    q    softmax(z_student / τ)      q at the same k tokens, and q_tail

    forward KL    Σ_i p_i log(p_i / q_i)                              β = 0
    reverse KL    Σ_i q_i log(q_i / p_i)                              β = 1
    JSD(β)        β KL(p ‖ m) + (1 − β) KL(q ‖ m),  m = β p + (1 − β) q       (Agarwal et al. 2024, arXiv 2306.13649)

With k = V these are the divergences of the whole distributions; with fewer tokens they are lower bounds of them.
"""

import math

import torch
from torch import Tensor

from fira.nn.cross_entropy import IGNORE_INDEX
from fira.nn.linear_losses import linear_losses
from fira.nn.objective import OfTrainedTokens, Stored
from fira.nn.projection import Projection

IDS, LOGS = "teacher_ids", "teacher_logs"  # names of the stored arrays, [B, T, k] and [B, T, k + 1]


class TeacherTokens(OfTrainedTokens):
    """The k most probable tokens of a model at each trained target. It is not trained.

    The report is [B, T, 2k + 1]: the k tokens, their log-probabilities, and the log-probability of the tail; zeros
    where the target is ignored. The tail of a vocabulary of k tokens is −inf.
    """

    def __init__(self, k: int, temperature: float) -> None:
        self.k, self.temperature = k, temperature

    def output(self, x: Tensor, projection: Projection, targets: Tensor, stored: Stored) -> Tensor:
        """[B, T, 2k + 1]."""
        trained = (targets.flatten() != IGNORE_INDEX)[:, None]

        def tokens(logits: Tensor, rows: slice) -> Tensor:
            logs = (logits / self.temperature).log_softmax(-1)
            top = logs.topk(self.k)
            found = torch.cat([top.indices.to(logs.dtype), top.values, _tail(logs, top.indices)], 1)
            return found.where(trained[rows], 0)

        return linear_losses(x.flatten(0, 1), projection, tokens).view(*targets.shape, 2 * self.k + 1)

    def sums(self, output: Tensor, targets: Tensor, stored: Stored) -> tuple[Tensor, Tensor]:
        return output.new_zeros(()), output.detach()

    def report_shape(self, sequences: int, length: int) -> tuple[int, ...]:
        return sequences, length, 2 * self.k + 1


class Distillation(OfTrainedTokens):
    """Mean divergence from the teacher in nats per trained target; also reports the cross-entropy with the data.

    stored: the tokens of the teacher and their log-probabilities, with that of the tail, at the same temperature.
    """

    metrics: tuple[str, ...] = ("cross_entropy",)

    def __init__(self, beta: float, temperature: float) -> None:
        self.beta, self.temperature = beta, temperature

    def output(self, x: Tensor, projection: Projection, targets: Tensor, stored: Stored) -> Tensor:
        """[B, T, 2]: divergence and cross-entropy of each target."""
        chosen = targets.flatten()[:, None]
        ids, teacher = (stored[name].flatten(0, 1) for name in (IDS, LOGS))

        def losses(logits: Tensor, rows: slice) -> Tensor:
            tokens = ids[rows].long()
            scaled = (logits / self.temperature).log_softmax(-1)
            student = torch.cat([scaled.gather(1, tokens), _tail(scaled, tokens)], 1)
            divergence = divergences(teacher[rows].to(student.dtype), student, self.beta)[:, None]
            nats = -logits.detach().log_softmax(-1).gather(1, chosen[rows].clamp(min=0))
            return torch.cat([divergence, nats], 1).where(chosen[rows] != IGNORE_INDEX, 0)

        return linear_losses(x.flatten(0, 1), projection, losses).view(*targets.shape, 2)

    def sums(self, output: Tensor, targets: Tensor, stored: Stored) -> tuple[Tensor, Tensor]:
        totals = output.flatten(0, 1).sum(0)
        return totals[0], totals.detach()

    def report_shape(self, sequences: int, length: int) -> tuple[int, ...]:
        return (2,)


def divergences(teacher: Tensor, student: Tensor, beta: float) -> Tensor:
    """Divergences [N] between log-probabilities [N, n] of the same events; see the top of this file."""
    if beta == 0:
        return _kl(teacher, student)
    if beta == 1:
        return _kl(student, teacher)
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    return beta * _kl(teacher, mixture) + (1 - beta) * _kl(student, mixture)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p ‖ q) [N] from log-probabilities; an event with p = 0 contributes 0, with a gradient of 0."""
    possible = p > -math.inf
    return torch.where(possible, p.exp() * (p.where(possible, 0) - q.where(possible, 0)), 0).sum(-1)


def _tail(logs: Tensor, tokens: Tensor) -> Tensor:
    """The log-probability [N, 1] of all tokens but `tokens` [N, k], from log-probabilities [N, V]; −inf for k = V."""
    if tokens.shape[1] == logs.shape[1]:
        return logs.new_full((len(logs), 1), -math.inf)
    return logs.scatter(1, tokens, -math.inf).logsumexp(-1, keepdim=True)
