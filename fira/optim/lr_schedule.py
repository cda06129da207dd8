"""Learning-rate schedules."""

import math


def learning_rate(step: int, steps: int, peak: float, low: float, warmup: int) -> float:
    """Linear from 0 to `peak` over the first `warmup` steps, then a half cosine down to `low` at the last step.

    step counts from 1. Loshchilov & Hutter 2016 (arXiv 1608.03983).
    """
    if step <= warmup:
        return peak * step / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
