"""The objective of a micro-batch, as the engine calls it on the last stage."""

from torch import Tensor

from fira.nn.context import Context


def microbatch_loss(output: Tensor, context: Context) -> tuple[Tensor, Tensor]:
    """Return the objective [] of a micro-batch and its report from the output of the head, see `fira.nn.objective`.

    The summed loss is multiplied by `context.training.loss_weight`, the inverse of the number of terms of the global
    batch. The objectives of all micro-batches on all ranks therefore add up to the mean loss, and their gradients to
    its gradient.
    """
    training = context.training
    assert training.targets is not None
    loss, report = training.objective.sums(output, training.targets, training.stored)
    return loss * training.loss_weight, report
