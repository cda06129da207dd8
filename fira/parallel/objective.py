"""The training objective: mean next-token cross-entropy over the global batch."""

from torch import Tensor

from fira.nn.context import Context


def objective(losses: Tensor, context: Context) -> tuple[Tensor, Tensor]:
    """Return the objective of a micro-batch and its summed loss, both [], from losses [n], each a sum over tokens.

    The head computes the losses from its logits and from the targets in the context. The objective is the sum over
    this micro-batch's tokens times `context.training.loss_weight`, which is 1 / (tokens of the global batch). The
    objectives of all micro-batches on all ranks therefore add up to the mean loss, and their gradients to its gradient.
    """
    total = losses.sum()
    return total * context.training.loss_weight, total
