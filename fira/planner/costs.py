"""Costs of layers, and their roofline estimate for a described device."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from fira.devices import AUTOCAST_DTYPES, parameter_dtype
from fira.optim.newton_schulz import flops
from fira.planner.device_specs import Hardware
from fira.planner.model_profile import ModelProfile, logits_bytes, saved_bytes

OPTIMIZER_PASSES = 10  # over the parameters' memory: AdamW reads 4 tensors and writes 3, norm and clipping take 3 more


@dataclass(frozen=True)
class LayerCost:
    """Costs of one layer for one micro-batch on a rank that holds all of its experts.

    The forward of the head computes the loss and already both of its gradients (fira/nn/cross_entropy.py).
    """

    forward: float  # seconds
    backward_input: float  # seconds for the gradient of the input
    backward_weight: float  # seconds for the gradients of the weights
    backward: float  # seconds for both in a full backward
    saved_for_backward: int  # bytes
    optimizer: float  # seconds of AdamW per step, with the cast of the weights for autocast
    workspace: int = 0  # bytes of temporary tensors
    saved_for_weight_grad: int = 0  # bytes between the two halves of a split backward
    orthogonalize: float = 0.0  # seconds per step for all matrices that Muon updates


def element_size(precision: str) -> int:
    """Bytes per element of parameters and messages for a value of --precision."""
    return parameter_dtype(precision).itemsize


def copy_size(precision: str) -> int:
    """Bytes per element of the copies that autocast uses of matrices; 0 without autocast."""
    dtype = AUTOCAST_DTYPES.get(precision)
    return 0 if dtype is None else dtype.itemsize


CostModel = Callable[[int], list[LayerCost]]  # micro-batch size → cost of each kind of layer


def roofline_costs(profile: ModelProfile, hardware: Hardware, precision: str, device: str = "cuda") -> CostModel:
    """Estimate each duration as the larger of FLOPs over FLOP/s and bytes over bytes/s.

    A layer's weights are multiplied once in the forward pass and once for each of the two gradients; those of frozen
    weights are not computed. The gradient of
    a product without weights (attention scores) costs twice its forward and is part of the gradient of the input.
    device: torch's device type.
    """
    rate, itemsize, copy = hardware.flops[precision], element_size(precision), copy_size(precision)
    # Muon has no products in fp16, see fira/parallel/rank_optimizer.py.
    muon_rate = hardware.flops.get("fp32", rate) if precision == "fp16" else rate
    layer_flops = dict(zip(profile.layers, profile.flops, strict=True))

    @cache
    def saved(kind: int, microbatch: int) -> tuple[int, int]:
        for_backward, for_weight_grad = saved_bytes(profile, kind, microbatch, AUTOCAST_DTYPES.get(precision))
        return for_backward * itemsize // 4, for_weight_grad * itemsize // 4

    def cost(kind: int, microbatch: int) -> LayerCost:
        k, tokens = profile.kinds[kind], microbatch * profile.tokens
        weight_flops = k.layer.flops_per_token(0) * tokens  # type: ignore[operator]
        other_flops = layer_flops[kind] * tokens - weight_flops
        # The sizes are linear in the number of sequences, so two micro-batch sizes determine all others.
        pairs = zip(saved(kind, 1), saved(kind, 2), strict=True)
        for_backward, for_weight_grad = (one + (microbatch - 1) * (two - one) for one, two in pairs)
        is_first, is_last = kind == profile.layers[0], kind == profile.layers[-1]
        trained = k.parameters + k.expert_parameters
        cast_traffic = (itemsize + copy) * sum(k.cast) if copy else 0
        weights = (
            0 if is_first else itemsize * (trained + sum(k.frozen))
        )  # an embedding reads only a few rows of its table

        def seconds(operations: float, traffic: float) -> float:
            return max(operations / rate, traffic / hardware.memory_bandwidth, hardware.seconds_per_layer)

        input_flops = 0 if is_last else weight_flops + 2 * other_flops
        backward_input = seconds(input_flops, weights + 2 * for_backward)
        gradient_flops = k.trained_share * weight_flops
        backward_weight = seconds(0 if is_last else gradient_flops, 2 * k.trained_share * weights + for_backward)
        return LayerCost(
            forward=seconds(
                2 * weight_flops + gradient_flops if is_last else weight_flops + other_flops, weights + 2 * for_backward
            ),
            backward_input=backward_input,
            backward_weight=backward_weight,
            backward=backward_input + backward_weight,
            saved_for_backward=for_backward,
            saved_for_weight_grad=for_weight_grad,
            optimizer=(OPTIMIZER_PASSES * itemsize * trained + cast_traffic) / hardware.memory_bandwidth,
            workspace=logits_bytes(profile, microbatch, device) if is_last else 0,
            orthogonalize=sum(max(flops(p.shape) / muon_rate, hardware.seconds_per_layer) for p in k.hidden),
        )

    return lambda microbatch: [cost(kind, microbatch) for kind in range(len(profile.kinds))]
