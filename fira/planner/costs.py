"""What layers cost on a device not at hand: FLOPs over FLOP/s, or bytes over bytes/s where those last longer."""

from collections.abc import Callable
from functools import cache

from fira.devices import AUTOCAST_DTYPES
from fira.planner.device_specs import Hardware
from fira.planner.model_profile import Cost, ModelProfile, kept_bytes, working_bytes

ITEM = {"fp64": 8}  # bytes of a parameter and of what travels; else 4
OPTIMIZER_PASSES = 10  # over a tensor of the parameters' size: AdamW reads 4 and writes 3, norm and clipping 3

Costs = Callable[[int], list[Cost]]  # micro-batch size → cost of each kind of layer


def estimate(profile: ModelProfile, hardware: Hardware, precision: str, device: str = "cuda") -> Costs:
    """The costs on a described device, of the kind that torch calls `device`.

    A layer's weights are multiplied once in a forward, once for either gradient; what has no weights (attention's
    scores) costs twice as much for the gradient of its input.
    """
    rate, item = hardware.flops[precision], ITEM.get(precision, 4)
    flops = dict(zip(profile.layers, profile.flops, strict=True))

    @cache
    def kept(kind: int, microbatch: int) -> tuple[int, int]:
        held, noted = kept_bytes(profile, kind, microbatch, AUTOCAST_DTYPES.get(precision))
        return held * item // 4, noted * item // 4

    def cost(kind: int, microbatch: int) -> Cost:
        k, tokens = profile.kinds[kind], microbatch * profile.tokens
        products = k.layer.flops_per_token(0) * tokens  # type: ignore[operator]
        own = flops[kind] * tokens - products
        # Sizes grow by the same from sequence to sequence, so two are enough to know all.
        pairs = zip(kept(kind, 1), kept(kind, 2), strict=True)
        bytes_kept, noted = (one + (microbatch - 1) * (two - one) for one, two in pairs)
        first, last = kind == profile.layers[0], kind == profile.layers[-1]
        weights = 0 if first else item * (k.parameters + k.expert_parameters)  # of the table a few rows are read

        def seconds(flops: float, traffic: float) -> float:
            return max(flops / rate, traffic / hardware.memory_bandwidth, hardware.seconds_per_layer)

        back = seconds(0 if last else products + 2 * own, weights + 2 * bytes_kept)
        weight = seconds(0 if last else products, 2 * weights + bytes_kept)
        return Cost(
            forward=seconds(3 * products if last else products + own, weights + 2 * bytes_kept),
            input=back,
            weight=weight,
            backward=back + weight,
            kept=bytes_kept,
            noted=noted,
            optimizer=OPTIMIZER_PASSES * item * (k.parameters + k.expert_parameters) / hardware.memory_bandwidth,
            working=working_bytes(profile, microbatch, device) if last else 0,
        )

    return lambda microbatch: [cost(kind, microbatch) for kind in range(len(profile.kinds))]
