"""Cautious weight decay."""

from torch import Tensor


def cautious_decay(weight: Tensor, update: Tensor, rate: float) -> Tensor:
    """What weight decay subtracts from a weight: rate · weight where weight and update have the same sign, else 0.

    update: of this step, which is subtracted from the weight. Decay then never opposes it. rate: learning rate times
    weight decay. Every element is rounded once, so the result does not depend on the tensor in which an element is.
    Source: Chen et al. 2025, arXiv 2510.12402.
    """
    return (weight * rate).mul_(weight * update >= 0)
