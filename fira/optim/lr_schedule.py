"""Learning-rate schedules.

cosine     ╱‾╲        linear   ╱╲         wsd      ╱‾‾‾‾‾‾╲       warm-up, stable, decay
         ╱    ‾╲_            ╱   ‾╲_             ╱         ╲
"""

import math

LR_SCHEDULES = ("cosine", "linear", "wsd")
WARMUP_SHAPES = ("linear", "log")


def learning_rate(
    step: int,
    steps: int,
    peak: float,
    low: float,
    warmup: int,
    schedule: str = "cosine",
    decay: float = 0.2,
    shape: str = "linear",
) -> float:
    """Warm-up from 0 to `peak` at step `warmup`, then a decay to `low` at step `steps` and later.

    Steps count from 1. "cosine" (Loshchilov & Hutter 2016, arXiv 1608.03983) and "linear" decay from the end of the
    warm-up on. "wsd" (Hu et al. 2024, arXiv 2404.06395) stays at `peak` and decays linearly in the last steps, whose
    share of all steps is `decay`, but not before the end of the warm-up.

    shape: of the warm-up. "log" is that of DeepSpeed's WarmupLR, in which the scheduler starts two steps later.
    """
    if step <= warmup and shape == "log":
        return peak * min(1.0, math.log(step + 1) / math.log(max(2, warmup)))
    if step <= warmup:
        return peak * step / warmup
    start = max(warmup, steps - round(decay * steps)) if schedule == "wsd" else warmup
    progress = min(1.0, max(0, step - start) / max(1, steps - start))
    if schedule == "cosine":
        return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * progress))
    return peak + (low - peak) * progress
