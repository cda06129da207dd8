"""Direct preference optimisation: losses of pairs of answers to the same prompt.

    log π        log-probability of an answer given its prompt, the sum over its tokens
    r            log π of the trained model − log π of the reference, which are the initial weights
    w, l         the chosen (winning) and the rejected (losing) answer, of n_w and n_l tokens

    sigmoid         −log σ(β (r_w − r_l))                    Rafailov et al. 2023, arXiv 2305.18290, equation 7
    sigmoid-norm    −log σ(β (r_w / n_w − r_l / n_l))        the same per token, as in Tülu 3
    ipo             (r_w / n_w − r_l / n_l − 1 / (2 β))²     Azar et al. 2023, arXiv 2310.12036, equation 17

Shapes: B sequences of T tokens in a micro-batch, at most P pairs in a sequence. Document 2p of a sequence is the prompt
with the chosen answer of pair p, document 2p + 1 the same prompt with its rejected answer.
"""

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fira.nn.cross_entropy import IGNORE_INDEX
from fira.nn.linear_losses import linear_losses
from fira.nn.objective import Stored, log_probabilities
from fira.nn.projection import Projection

METRICS: tuple[str, ...] = (
    *("reward_chosen", "reward_rejected", "reward_accuracy", "reward_margin"),
    *("logp_chosen", "logp_rejected"),
)


class PreferenceLoss:
    """The mean loss over the pairs of the global batch.

    loss: sigmoid, sigmoid-norm or ipo. beta: β. Arguments in `stored`, see `preference_pairs`: documents int64 [B, T],
    the number of each token's document; and reference float64 [B, P, 2], log π of the reference for chosen and
    rejected. A reward is β r, for every loss. All sums over tokens are in float64.
    """

    metrics = METRICS

    def __init__(self, loss: str, beta: float) -> None:
        self.loss, self.beta = loss, beta

    def count(self, targets: np.ndarray, stored: Mapping[str, np.ndarray]) -> int:
        """The number of pairs."""
        return int((stored["documents"].max(1) + 1).sum()) // 2

    def output(self, x: Tensor, projection: Projection, targets: Tensor, stored: Stored) -> Tensor:
        """[B, T], the log-probability of each target, 0 where it is ignored."""
        flat = targets.flatten()

        def logs(logits: Tensor, rows: slice) -> Tensor:
            return log_probabilities(logits, flat[rows])

        return linear_losses(x.flatten(0, 1), projection, logs).view_as(targets)

    def sums(self, output: Tensor, targets: Tensor, stored: Stored) -> tuple[Tensor, Tensor]:
        documents, reference = stored["documents"], stored["reference"]
        logp = _sums_by_document(output, documents, reference)
        tokens = _sums_by_document(targets != IGNORE_INDEX, documents, reference)
        present = tokens[..., 0] > 0
        losses = self._losses(logp - reference, tokens) * present
        with torch.no_grad():
            chosen, rejected = (self.beta * (logp - reference)).unbind(-1)
            numbers = [losses, chosen, rejected, chosen > rejected, chosen - rejected, *logp.unbind(-1)]
            report = torch.stack([(number * present).sum() for number in numbers])
        return losses.sum(), report

    def _losses(self, ratio: Tensor, tokens: Tensor) -> Tensor:
        """The loss [B, P] of each pair. ratio: r. tokens: n, 0 without a pair; both are [B, P, 2]."""
        score = ratio if self.loss == "sigmoid" else ratio / tokens.clamp(min=1)
        difference = score[..., 0] - score[..., 1]
        if self.loss == "ipo":
            return (difference - 1 / (2 * self.beta)).square()
        return -F.logsigmoid(self.beta * difference)

    def report_shape(self, sequences: int, length: int) -> tuple[int, ...]:
        return (1 + len(self.metrics),)


def _sums_by_document(x: Tensor, documents: Tensor, like: Tensor) -> Tensor:
    """x [B, T], 0 in padding → float64 [B, P, 2], the shape of `like`: the sum over each document."""
    sums = like.new_zeros(like.shape).flatten(1)
    return sums.scatter_add(1, documents.clamp(min=0), x.to(like.dtype)).view_as(like)
