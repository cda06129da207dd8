"""Learning-rate schedules.

cosine     ╱‾╲        linear   ╱╲         wsd      ╱‾‾‾‾‾‾╲       warm-up, stable, decay
         ╱    ‾╲_            ╱   ‾╲_             ╱         ╲
"""

import math

LR_SCHEDULES = ("cosine", "linear", "wsd")


def learning_rate(
    step: int, steps: int, peak: float, low: float, warmup: int, schedule: str = "cosine", decay: float = 0.2
) -> float:
    """Linear warm-up from 0 to `peak` at step `warmup`, then a decay to `low` at step `steps` and later.

    Steps count from 1. "cosine" (Loshchilov & Hutter 2016, arXiv 1608.03983) and "linear" decay from the end of the
    warm-up on. "wsd" (Hu et al. 2024, arXiv 2404.06395) stays at `peak` and decays linearly in the last steps, whose
    share of all steps is `decay`, but not before the end of the warm-up.
    """
    if step <= warmup:
        return peak * step / warmup
    start = max(warmup, steps - round(decay * steps)) if schedule == "wsd" else warmup
    progress = min(1.0, max(0, step - start) / max(1, steps - start))
    if schedule == "cosine":
        return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * progress))
    return peak + (low - peak) * progress
