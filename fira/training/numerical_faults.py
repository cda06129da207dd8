"""Numerical faults of a run: a loss or a gradient that is not finite, and loss spikes.

A loss is a spike if it exceeds the mean of the last WINDOW losses by more than SIGMAS of their standard deviations, as
in OLMo-core's SkipStepOptimizer. The rule applies from WINDOW / 2 losses on. The losses are the same on all ranks, so
that all ranks decide the same.
"""

import math
from collections.abc import Mapping
from statistics import fmean
from typing import Any

from fira.errors import UserError

WINDOW = 128
SIGMAS = 6


class NumericalFault(UserError):
    """Raised on all ranks if a loss or a gradient is not finite, or if a loss is a spike."""


class FaultHistory:
    """Recent losses, and the rollbacks of the run: part of the training state, so that a resumed run decides the same.

    find_spikes: whether `add` raises on a spike. rollbacks: step of the fault, step of the restored checkpoint, and the
    range [first, end) of sequences that were not read again.
    """

    def __init__(self) -> None:
        self.find_spikes = False
        self.losses: list[float] = []
        self.rollbacks: list[dict[str, int]] = []

    def add(self, loss: float) -> None:
        """Record the loss of a step. Raises NumericalFault if it is a spike and `find_spikes` is set."""
        if self.find_spikes and len(self.losses) >= WINDOW // 2:
            mean = fmean(self.losses)
            deviation = math.sqrt(fmean((earlier - mean) ** 2 for earlier in self.losses))
            if loss > mean + SIGMAS * deviation:
                raise NumericalFault(
                    f"the loss {loss:.4g} is a spike, more than {SIGMAS} standard deviations of {deviation:.2g} above "
                    f"the mean of the last {len(self.losses)} steps, {mean:.4g}"
                )
        self.losses = [*self.losses, loss][-WINDOW:]

    def state_dict(self) -> dict[str, Any]:
        return {"losses": self.losses, "rollbacks": self.rollbacks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.losses, self.rollbacks = list(state["losses"]), list(state["rollbacks"])
