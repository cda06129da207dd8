"""The training objective: cross-entropy of the next token, as the mean over the global batch."""

from torch import Tensor

from fira.nn.context import Context


def objective(losses: Tensor, context: Context) -> tuple[Tensor, Tensor]:
    """Combine the losses of a micro-batch: losses [n], each a sum over tokens → (objective, summed loss), both [].

    The head has already compared logits with targets, which it gets from the context. The objective is the sum over
    this micro-batch's tokens times `context.training.loss_weight`, which is 1 / (tokens of the global batch). The
    objectives of all micro-batches on all ranks therefore add up to the mean loss, and their gradients to its gradient.
    """
    total = losses.sum()
    return total * context.training.loss_weight, total
