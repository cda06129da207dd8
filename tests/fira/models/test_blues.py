"""The order of the router's weight and the norm in blues."""

from dataclasses import replace

import torch.nn.functional as F

from fira.models.blues import BluesConfig
from fira.nn.context import Context
from tests.fira.models.small_families import BLUES, make_model, make_tokens


def test_router_of_blues_has_a_gradient() -> None:
    """With one expert per token, a norm after the router's weight would cancel the weight and its gradient."""

    def gradient(config: BluesConfig) -> float:
        model, tokens = make_model(replace(config, top_k=1, aux_coefficient=0.0, norm_eps=1e-12)), make_tokens(config)
        F.cross_entropy(model(tokens, Context()).flatten(0, 1), tokens.flatten()).backward()
        return float(model.get_parameter("layers.1.moe.router.gate.weight").grad.norm())

    assert gradient(BLUES) > 100 * gradient(replace(BLUES, gate_before_norm=True))
