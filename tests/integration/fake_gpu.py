"""A device "gpu" whose tensors have no data, on which the real models and autograd run, to find errors without a GPU.

PyTorch lets a Python program define a device. Together with fake tensors (shape, dtype and device, but no data):

- an operation on tensors of two devices raises an error,
- reading a value on the host is recorded with the place of the call (`Recorder.reads`), as are copies between devices,
- kernels can be counted (`Recorder.kernels`), and autocast casts the same operators as on CUDA.

`set_up` changes the whole process and cannot be undone; tests call it in a process of its own.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

ROOT = Path(__file__).parents[2]
SOURCES = (ROOT / "fira", ROOT / "pipeline")

# The operators that autocast changes on CUDA, as listed in torch's autocast_mode.h. All others that have an autocast
# kernel for CUDA take fp32.
LOWER_PRECISION = {
    *("addmm", "addmv", "addr", "matmul", "einsum", "mm", "mv", "linalg_vecdot", "linalg_multi_dot", "linear"),
    *("baddbmm", "addbmm", "bmm", "chain_matmul", "scaled_dot_product_attention", "prelu"),
}
FP32_RESULT = {"prod", "softmax", "log_softmax", "cumprod", "cumsum", "sum", "linalg_vector_norm", "linalg_matrix_norm"}
WIDEST = {"addcdiv", "addcmul", "atan2", "bilinear", "cross", "dot", "vdot", "index_put", "tensordot", "scatter_add"}
NOT_USED = ("conv", "cudnn", "thnn", "cell", "flash")  # parts of the names of operators that models here do not use

ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "_unsafe_view"}
READS = {"_local_scalar_dense", "equal", "is_nonzero", "nonzero"}


class _Module(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def set_up(capability: tuple[int, int]) -> None:
    """Define the device. capability: what `torch.cuda.get_device_capability` returns for it."""
    _setup_privateuseone_for_python_backend("gpu", backend_module=_Module())
    torch.cuda.get_device_capability = lambda device=None: capability
    FakeTensorMode.avoid_device_init = True  # type: ignore[assignment, misc]  # torch.tensor makes a CPU tensor first
    FakeTensor.is_cuda = property(lambda x: x.device.type == "gpu")  # type: ignore[assignment]
    _define_autocast()
    for key in ("PrivateUse1", "AutogradPrivateUse1"):
        LIBRARY.impl("scaled_dot_product_attention", _attention, key)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention by the kernels that torch has for CUDA, instead of single products."""
    if mask is None and q.dtype in (torch.float16, torch.bfloat16):
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, scale=scale)[0]
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    if mask is not None:
        mask = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, float("-inf"))
        mask = mask.expand(*q.shape[:3], k.shape[2])
    function = torch.ops.aten._scaled_dot_product_efficient_attention
    return function(q, k, v, mask, q.requires_grad, dropout_p, is_causal, scale=scale)[0]


def _define_autocast() -> None:
    for name in torch._C._dispatch_get_all_op_names():
        namespace, _, operator = name.partition("::")
        base, _, overload = operator.partition(".")
        on_cuda = torch._C._dispatch_has_kernel_for_dispatch_key(name, "AutocastCUDA")
        if namespace == "aten" and on_cuda and not any(part in base for part in NOT_USED):
            function = getattr(getattr(torch.ops.aten, base), overload or "default")
            LIBRARY.impl(operator, _autocast(base, function), "AutocastPrivateUse1")
    FALLBACK.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")


LIBRARY = torch.library.Library("aten", "IMPL")  # in variables, because a library that is deleted is undefined
FALLBACK = torch.library.Library("_", "IMPL")


def _autocast(base: str, function: Any) -> Callable[..., Any]:
    """The operator with its arguments cast by the rules of autocast, without the cache of cast weights."""
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(key):
            low = torch.get_autocast_dtype("gpu")
            floating = [x for x in _flat(args) if isinstance(x, Tensor) and x.is_floating_point()]
            if base in FP32_RESULT:
                narrow = bool(floating) and floating[0].dtype in (torch.float16, torch.bfloat16)
                return function(*args, **{**kwargs, **({"dtype": torch.float32} if narrow else {})})
            wide = torch.float32
            if base in LOWER_PRECISION or (base in WIDEST and all(x.dtype == low for x in floating)):
                wide = low
            return function(*_cast(args, wide), **_cast(kwargs, wide))

    return run


def _flat(value: Any) -> list[Any]:
    return [x for part in value for x in _flat(part)] if isinstance(value, tuple | list) else [value]


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        eligible = value.is_floating_point() and value.dtype != torch.float64 and value.device.type == "gpu"
        return value.to(dtype) if eligible else value
    if isinstance(value, tuple | list):
        return type(value)(_cast(part, dtype) for part in value)
    return {name: _cast(part, dtype) for name, part in value.items()} if isinstance(value, dict) else value


class Recorder(TorchDispatchMode):
    """Records what the host does with the device.

    answers: the numbers that the host reads one after another; if none is left, reading raises, as always with fake
    tensors.
    reads: places at which the host reads a value and therefore waits for the device. downloads, uploads: places of
    copies from and to the device for which the host waits. asynchronous: places of copies for which it does not, if the
    memory on the host is pinned. kernels: operators that compute something, by name. An operator counts as one kernel,
    although some, such as a sort, are several; views and allocations are none.
    """

    def __init__(self, answers: Iterable[int] = ()) -> None:
        super().__init__()
        self.answers = iter(answers)
        self.reads: Counter[str] = Counter()
        self.downloads: Counter[str] = Counter()
        self.uploads: Counter[str] = Counter()
        self.asynchronous: Counter[str] = Counter()
        self.kernels: Counter[str] = Counter()

    def result(self) -> dict[str, dict[str, int]]:
        names = ("reads", "downloads", "uploads", "asynchronous", "kernels")
        return {name: dict(getattr(self, name)) for name in names}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        base = function.overloadpacket.__name__
        tensors = [x for x in _flat([*args, *kwargs.values()]) if isinstance(x, Tensor)]
        on_gpu = any(x.device.type == "gpu" for x in tensors)
        if base in READS and on_gpu:
            self.reads[_place()] += 1
        if base == "_local_scalar_dense" and (answer := next(self.answers, None)) is not None:
            return answer
        result = function(*args, **kwargs)
        outputs = [x for x in _flat([result]) if isinstance(x, Tensor)]
        produced = any(x.device.type == "gpu" for x in outputs)
        if (base in ("_to_copy", "copy_") and on_gpu != produced) or (
            base == "copy_" and len({x.device for x in tensors}) > 1
        ):
            waits = self.uploads if outputs[0].device.type == "gpu" else self.downloads
            asynchronous = kwargs.get("non_blocking") or (base == "copy_" and len(args) > 2 and args[2])
            (self.asynchronous if asynchronous else waits)[_place()] += 1
        elif (on_gpu or produced) and not function.is_view and base not in ALLOCATIONS and function.namespace == "aten":
            self.kernels[base] += 1
        return result


def _place() -> str:
    """File and function of the project's source that is being executed; for a comprehension, the function around it."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        named = not frame.f_code.co_name.startswith("<")  # newer Pythons have no frame for a comprehension
        if named and any(path.is_relative_to(folder) for folder in SOURCES):
            return f"{path.relative_to(ROOT)}: {frame.f_code.co_name}"
        frame = frame.f_back
    return "test"
