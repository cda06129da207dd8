"""Learning-rate schedules."""

import math


def learning_rate(step: int, steps: int, peak: float, low: float, warmup: int) -> float:
    """Linear warm-up from 0 to `peak` at step `warmup`, then cosine decay to `low` at step `steps` and later.

    Steps count from 1. Source: Loshchilov & Hutter 2016 (arXiv 1608.03983).
    """
    if step <= warmup:
        return peak * step / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
