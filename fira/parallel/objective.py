"""The training objective: next-token cross-entropy, so weighted that all micro-batches of all ranks make one mean."""

from torch import Tensor

from fira.nn.context import Context


def objective(losses: Tensor, context: Context) -> tuple[Tensor, Tensor]:
    """losses [n], summed over the tokens of each part of a micro-batch → (objective, summed loss).

    The last layer has already computed the losses from its logits and the targets in the context.
    The objective is the sum over this micro-batch's tokens times `context.loss_weight`, one over the number of tokens
    in the global batch: gradients then add up to those of the mean, whoever computes them.
    """
    total = losses.sum()
    return total * context.loss_weight, total
