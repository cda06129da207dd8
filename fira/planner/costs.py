"""Costs of layers, and their roofline estimate for a described device."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

from fira.devices import AUTOCAST_DTYPES, parameter_dtype
from fira.nn.cross_entropy import rows_per_block
from fira.optim.newton_schulz import flops
from fira.planner.device_specs import Hardware
from fira.planner.model_profile import ModelProfile, layer_memory, logits_bytes
from fira.planner.tensor_memory import LayerMemory

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
    optimizer: float  # seconds of AdamW per step, with the cast of the weights for autocast
    orthogonalize: float = 0.0  # seconds per step for all matrices that Muon updates
    memory: LayerMemory = field(default_factory=LayerMemory)


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
    def measured(kind: int, microbatch: int) -> LayerMemory:
        return layer_memory(profile, kind, microbatch, AUTOCAST_DTYPES.get(precision)).map(lambda x: x * itemsize / 4)

    # The head's temporary tensors grow up to this size. They are those of a CPU, where the tensors are.
    block = -(-rows_per_block("cpu", profile.config.vocab_size) // profile.tokens)

    def memory(kind: int, microbatch: int) -> LayerMemory:
        """The sizes are linear in the number of sequences, so two micro-batch sizes determine all others."""
        unit = block if kind == profile.layers[-1] and microbatch >= block else 1
        one, two = measured(kind, unit), measured(kind, 2 * unit)
        result = one.map(lambda a, b: a + (microbatch / unit - 1) * (b - a), two)
        logits = [logits_bytes(profile, microbatch, where) for where in (device, "cpu")]
        more = logits[0] - logits[1] if kind == profile.layers[-1] else 0
        return result._replace(forward=result.forward + more)

    def cost(kind: int, microbatch: int) -> LayerCost:
        k, tokens = profile.kinds[kind], microbatch * profile.tokens
        weight_flops = k.layer.flops_per_token(0) * tokens  # type: ignore[operator]
        other_flops = layer_flops[kind] * tokens - weight_flops
        tensors = memory(kind, microbatch)
        for_backward = tensors.saved + itemsize * tokens * profile.width  # with the input
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
            optimizer=(OPTIMIZER_PASSES * itemsize * trained + cast_traffic) / hardware.memory_bandwidth,
            orthogonalize=sum(max(flops(p.shape) / muon_rate, hardware.seconds_per_layer) for p in k.hidden),
            memory=tensors,
        )

    return lambda microbatch: [cost(kind, microbatch) for kind in range(len(profile.kinds))]
