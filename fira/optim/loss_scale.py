"""Dynamic loss scaling for fp16."""


class LossScale:
    """The factor by which the objective is multiplied (Micikevicius et al. 2017, arXiv 1710.03740); 1 if disabled.

    It is halved after each step with an overflow and doubled after GROWTH_INTERVAL consecutive steps without one.
    """

    GROWTH_INTERVAL = 1000

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self.value = 2.0**15 if enabled else 1.0
        self.good_steps = 0

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value, "good_steps": self.good_steps}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore a saved scale. Ignored if scaling is disabled, or if the scale is 1, as in runs without scaling."""
        if self.enabled and state["value"] != 1:
            self.value, self.good_steps = state["value"], int(state["good_steps"])

    def update(self, overflow: bool) -> None:
        """Adjust the scale after a step. overflow: whether its gradients overflowed."""
        if not self.enabled:
            return
        self.good_steps = 0 if overflow else self.good_steps + 1
        if overflow:
            self.value /= 2
        elif self.good_steps % self.GROWTH_INTERVAL == 0:
            self.value *= 2
