"""GPU checks of single operations: on the device, fused where there is a kernel, against plain forms in float64."""

import time
from collections.abc import Callable, Sequence
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from fira.devices import AUTOCAST_DTYPES, auto_precision
from fira.doctor.gpu_check import Target
from fira.nn.cross_entropy import linear_cross_entropy
from fira.nn.dropout import Dropout, at_place, random_bits, salt, token_keys
from fira.nn.kernels import fused
from fira.nn.mlp import gated
from fira.nn.moe.experts import Experts
from fira.nn.moe.grouped_linear import RowGroups, grouped_linear
from fira.nn.moe.permutation import gather_rows, sort_by_expert, weighted_sum
from fira.nn.projection import Projection

# Largest error relative to the largest element: a few roundings in the dtype, and sums of many products.
ERROR = {torch.float32: 1e-4, torch.bfloat16: 2**-5, torch.float16: 2**-8}
SIZES = {"cuda": (8192, 768), "cpu": (40, 37)}  # rows and width; those of a CPU suit Triton's interpreter
REPEATS = 10
Operation = tuple[Callable[..., Tensor], Sequence[Tensor]]  # a function and its arguments, on one device

NAMES = (
    *("grouped product", "dropout bits", "token keys", "hash dropout", "gather of rows", "weighted sum of rows"),
    *("gated SiLU", "gated GELU", "experts with bias and GELU", "cross-entropy"),
)


def check_operation(target: Target, name: str) -> str:
    """An operation agrees with float64 on the CPU, in values and gradients, in fp32 and in the precision of `auto`."""
    device = torch.device(target.device, 0) if target.device == "cuda" else torch.device("cpu")
    size = SIZES[device.type]
    tested, reference = operations(device, *size), operations(torch.device("cpu"), *size)
    lines = []
    selected = AUTOCAST_DTYPES.get(auto_precision(device), torch.float32 if device.type == "cuda" else torch.bfloat16)
    for dtype in dict.fromkeys((torch.float32, selected)):
        errors = [
            _largest_error(operation, reference[full], dtype, full)
            for full, operation in tested.items()
            if full.startswith(name)
        ]
        lines.append(f"{str(dtype).removeprefix('torch.')} error {max(errors):.0e}")
    operation = next(operation for full, operation in tested.items() if full.startswith(name))
    with patch.object(fused, "DEVICE", "none"):  # selects the plain form
        plain = _seconds(operation, dtype, device)
    speed = plain / _seconds(operation, dtype, device)
    kernels = "" if fused.use_fused(operation[1][0]) else " (not fused)"
    return f"{', '.join(lines)}; forward and backward {speed:.2f} × as fast as the plain form{kernels}"


def operations(device: torch.device, rows: int, width: int) -> dict[str, Operation]:
    """The operations by name, with the same values on every device. They start every kernel of fira/nn/kernels."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    experts = torch.rand(rows, 4, generator=generator).topk(2).indices.flatten()
    order, inverse = (index.to(device) for index in sort_by_expert(experts))
    groups = RowGroups(torch.bincount(experts, minlength=4).to(device))
    sequences = torch.tensor([1, 2**61 + 12345], device=device)
    keys = token_keys(sequences, 7, rows).flatten()  # of the 2 · rows assignments
    dropout, place = Dropout(0.1, "doctor"), salt("doctor")
    bank = Experts(4, width, 2 * width, 0.1, "doctor")
    shapes = {name: parameter.shape for name, parameter in bank.named_parameters()}
    targets = torch.randint(1000, (rows,), generator=generator).to(device)

    def call_experts(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(bank, dict(zip(shapes, parameters, strict=True)), (x, groups, keys))

    found: dict[str, Operation] = {
        "dropout bits": (lambda k: random_bits(at_place(k, place), 614), [keys]),
        "token keys": (lambda k: token_keys(k, 7, rows), [sequences]),
        "hash dropout": (lambda x: dropout(x, keys), [torch.ones(2 * rows, width, device=device)]),
        "gather of rows": (lambda x: gather_rows(x, order, inverse, 2), [normal(rows, width)]),
        "weighted sum of rows": (
            lambda x, weights: weighted_sum(x, weights, order, inverse),
            [normal(2 * rows, width), normal(rows, 2)],
        ),
        "gated SiLU": (lambda gate, a: gated(F.silu, gate, a), [normal(rows, width), normal(rows, width)]),
        "gated GELU": (lambda both: gated(F.gelu, both), [normal(rows, 2 * width)]),
        "experts with bias and GELU": (
            call_experts,
            [normal(2 * rows, width), *(normal(*shape) / shape[-1] ** 0.5 for shape in shapes.values())],
        ),
        "cross-entropy": (
            lambda x, weight: linear_cross_entropy(x, Projection(weight), targets),
            [normal(rows, width), normal(1000, width) / width**0.5],
        ),
    }
    counts = torch.tensor([5, 0, 17, 40], device=device)  # one expert without rows
    for inputs, outputs, rest in ((64, 128, 0), (128, 64, 3), (128, 614, 3), (614, 128, 0)):
        some = RowGroups(counts, ragged=rest > 0)
        found[f"grouped product, {inputs} → {outputs}, {rest} rows of no expert"] = (
            lambda x, weight, bias, some=some: grouped_linear(x, some, weight, bias),
            [normal(62 + rest, inputs), normal(4, outputs, inputs), normal(4, outputs)],
        )
    return found


def _largest_error(tested: Operation, reference: Operation, dtype: torch.dtype, name: str) -> float:
    """The largest difference from the reference in float64, relative to the largest element. Integers must be equal."""
    largest = 0.0
    for got, want in zip(_results(tested, dtype), _results(reference, dtype, torch.float64), strict=True):
        error = float((got.cpu().double() - want.double()).abs().max() / want.double().abs().max())
        limit = ERROR[dtype] if got.is_floating_point() else 0.0
        assert error <= limit, f"{name}, {dtype}: relative error {error:.1e}, allowed {limit:.0e}"
        largest = max(largest, error)
    return largest


def _results(operation: Operation, rounded: torch.dtype, dtype: torch.dtype | None = None) -> list[Tensor]:
    """The value and the gradients of the inputs, which are rounded to a dtype. dtype: of the computation."""
    function, arguments = operation
    leaves = [x.to(rounded).to(dtype).requires_grad_() if x.is_floating_point() else x for x in arguments]
    y = function(*leaves)
    if not y.is_floating_point():
        return [y]
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(rounded).to(y)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def _seconds(operation: Operation, dtype: torch.dtype, device: torch.device) -> float:
    """Seconds of a forward and a backward."""
    function, arguments = operation
    leaves = [x.to(dtype).requires_grad_() if x.is_floating_point() else x for x in arguments]
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        y = function(*leaves)
        if y.requires_grad:
            torch.autograd.grad(y, leaves, torch.ones_like(y))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times)
