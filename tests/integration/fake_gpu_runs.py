"""Programs on the fake GPU of `fake_gpu.py`. The file runs as a process of its own: cases as JSON in, results out.

A case is [function, keyword arguments]. A case that raises an error has the result {"error": …}.
"""

import json
import os
import sys
import traceback
from contextlib import ExitStack
from dataclasses import replace
from importlib import import_module
from itertools import cycle, repeat
from pkgutil import iter_modules
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from fira.data.rows import Rows
from fira.decoding.decoding import continuation
from fira.decoding.sampling import Sampling
from fira.devices import AUTOCAST_DTYPES, parameter_dtype
from fira.models.language_model import LanguageModel
from fira.models.registry import PRESETS, build
from fira.nn import cross_entropy, kernels
from fira.nn.context import Context, DecodingContext
from fira.nn.kv_cache import KVCache
from fira.optim.adamw import AdamW
from fira.optim.settings import OptimizerSettings
from fira.parallel import parallelize as parallelize_module
from fira.parallel.batch_split import BatchSplit
from fira.parallel.overlapped_reduction import OverlappedReduction
from fira.parallel.parallelize import parallelize
from fira.training.trainer import Trainer
from pipeline.mesh import Layout, make_mesh
from tests.integration.fake_gpu import Recorder, set_up

SEQUENCES = 2  # per micro-batch


class _Sequences:
    """Training and validation sequences without data."""

    consumed = 0

    def __init__(self, length: int, count: int, packed: bool) -> None:
        self.length = length
        self.count = count
        self.packed = packed

    def __len__(self) -> int:
        return self.count

    def batch(self, first: int, count: int) -> Rows:
        documents = np.tile(np.arange(self.length) // 5, (count, 1)) if self.packed else None
        return Rows(*np.zeros((2, count, self.length), np.int64), documents)


def train(
    preset: str,
    precision: str = "bf16",
    dropout: bool = True,
    layout: tuple[int, int, int] = (1, 1, 1),
    recompute: int = 0,
    changes: dict[str, Any] | None = None,
    logits: int = 2**27,
    microbatches: int = 2,
    between_machines: bool = False,
    packed: bool = False,
) -> dict[str, Any]:
    """One step of several micro-batches and one evaluation on rank 0 of a layout, in which no rank sends anything.

    The model has one block. logits: the largest number of logits that the loss computes at once. microbatches: of the
    step and of the evaluation. between_machines: whether ranks that share experts are on several machines. packed:
    documents of five tokens are packed into the sequences.
    """
    config = _config(preset, dropout, changes or {})
    device = torch.device("gpu:0")
    with ExitStack() as stack:
        whole = _meta_model(config)
        mesh = replace(_mesh(stack, Layout(*layout), device), ep_between_machines=between_machines)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        dtype, autocast = parameter_dtype(precision), AUTOCAST_DTYPES.get(precision)
        model = parallelize(whole, mesh, 7, [device], "1f1b", dtype, autocast, recompute)
        split = BatchSplit(SEQUENCES, mesh.layout.dp, mesh.dp_rank, config.d_model, device)
        stack.enter_context(patch.dict(cross_entropy.LOGITS, {"gpu": logits}))
        trainer = Trainer(model, mesh, split, "1f1b", OptimizerSettings(), 1.0, precision == "fp16")
        trainer.reduction = OverlappedReduction(model, mesh)  # as with NCCL
        rows = SEQUENCES * config.seq_len * _top_k(whole) // getattr(config, "num_experts", 1)  # of each expert
        step, evaluation = Recorder(repeat(rows)), Recorder(repeat(rows))
        sequences = microbatches * SEQUENCES * mesh.layout.dp
        data = _Sequences(config.seq_len, sequences, packed)
        with step:
            trainer.step(data, sequences, 1e-3, seed=1)  # type: ignore[arg-type]
        with evaluation:
            trainer.forward.mean(data, sequences)  # type: ignore[arg-type]
        return {"step": step.result(), "evaluation": evaluation.result()}


def count_layer(preset: str, fused: bool) -> dict[str, int]:
    """Kernels of the forward and backward of one block in bf16, with dropout, by operator or by fused kernel."""
    config = _config(preset, dropout=True, changes={})
    with FakeTensorMode(allow_non_fake_inputs=True):
        block = _empty(_meta_model(config)).layers[1]
        x = torch.empty(SEQUENCES, config.seq_len, config.d_model, device="gpu", requires_grad=True)
        context = Context(
            lengths=torch.zeros(SEQUENCES, dtype=torch.int64, device="gpu"),
            keys=torch.zeros(SEQUENCES, dtype=torch.int64, device="gpu"),
        )
        context.training.aux_weights = torch.zeros(SEQUENCES, device="gpu")
        with Recorder() as recorder, ExitStack() as patches:
            if fused:
                _count_launches(recorder, patches)
            with torch.autocast("gpu", torch.bfloat16):
                y = block(x, context)
            y.backward(torch.zeros_like(y))
        return dict(recorder.kernels)


def _count_launches(recorder: Recorder, patches: ExitStack) -> None:
    """Select the fused kernels on the fake GPU, and count their launches instead of running them."""

    def launch(kernel: Any, grid: Any, *arguments: Any, **constants: Any) -> None:
        recorder.kernels[f"fused {kernel.fn.__name__}"] += 1

    patches.enter_context(patch.object(kernels.fused, "DEVICE", "gpu"))
    for module in (import_module(f"{kernels.__name__}.{info.name}") for info in iter_modules(kernels.__path__)):
        if hasattr(module, "launch"):
            patches.enter_context(patch.object(module, "launch", launch))


def decode(preset: str, precision: str) -> dict[str, Any]:
    """The model's calls for a prompt of eight tokens, and then for two single tokens, with a cache."""
    config = _config(preset, dropout=True, changes={})
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model, cache, recorder = _empty(_meta_model(config)).eval(), KVCache(), Recorder()
        top_k = _top_k(model)
        with recorder, torch.autocast("gpu", AUTOCAST_DTYPES.get(precision), enabled=precision in AUTOCAST_DTYPES):
            for length in (8, 1, 1):
                # All tokens choose the first experts.
                rows = [length] * top_k + [0] * (getattr(config, "num_experts", 1) - top_k)
                recorder.answers = cycle(rows)
                tokens = torch.zeros(1, length, dtype=torch.int64, device="gpu")
                logits = model(tokens, Context(decoding=DecodingContext(cache, logits_to_keep=1)))
        assert logits.shape == (1, 1, config.vocab_size)
        assert logits.device.type == "gpu"
        return recorder.result()


def generate(preset: str, rows: int) -> dict[str, Any]:
    """Sample three tokens for each of several prompts in bf16."""
    prompts = [[1, 2, 3]] * rows
    generator = continuation.__wrapped__  # type: ignore[attr-defined]  # fake tensors do not support inference mode
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model = _empty(_meta_model(_config(preset, dropout=True, changes={}))).eval()
        with Recorder(repeat(1)) as recorder, torch.autocast("gpu", torch.bfloat16):
            assert len(list(generator(model, prompts, 3, Sampling(top_k=5)))) == 3
        return recorder.result()


def update() -> dict[str, int]:
    """Kernels of an update by AdamW of parameters on two devices, each with decayed ones and others."""
    with FakeTensorMode():
        names = [f"{kind}{device}" for kind in ("matrix", "vector") for device in range(2)]
        parameters = {name: torch.empty(3, device=f"gpu:{name[-1]}", requires_grad=True) for name in names}
        for parameter in parameters.values():
            parameter.grad = torch.empty_like(parameter)
        with Recorder() as recorder:
            AdamW(parameters, {"matrix0", "matrix1"}, OptimizerSettings()).step(lr=1e-3)
        assert not recorder.reads
        return dict(recorder.kernels)


def mix_devices() -> None:
    with FakeTensorMode():
        torch.zeros(2, device="gpu") + torch.zeros(2)


def read_value() -> None:
    with FakeTensorMode(), Recorder():
        torch.zeros(2, device="gpu").tolist()


def _config(preset: str, dropout: bool, changes: dict[str, Any]) -> Any:
    """The config of a preset with one block, with dropout or without if the family has it."""
    config = replace(PRESETS[preset], num_layers=1, **changes)
    return replace(config, dropout=0.1 if dropout else 0.0) if hasattr(config, "dropout") else config


def _meta_model(config: Any) -> LanguageModel:
    with torch.device("meta"):
        return build(config)


def _to_empty(layer: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """`parallelize._to_empty` without nn.Module._apply, which cannot replace fake tensors."""
    for module in layer.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    kind = dtype if tensor.is_floating_point() else tensor.dtype
                    empty = torch.empty(tensor.shape, dtype=kind, device=device)
                    tensors[name] = nn.Parameter(empty) if isinstance(tensor, nn.Parameter) else empty


def _empty(model: LanguageModel) -> LanguageModel:
    """The model with tensors on the fake GPU."""
    for layer in model.layers:
        _to_empty(layer, torch.device("gpu:0"), torch.float32)
    model.tie()
    return model


def _top_k(model: LanguageModel) -> int:
    return max((module.router.top_k for module in model.modules() if hasattr(module, "router")), default=1)


def _mesh(stack: ExitStack, layout: Layout, device: torch.device) -> Any:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=layout.world)
    stack.callback(dist.destroy_process_group)
    with FakeTensorMode(allow_non_fake_inputs=True):
        return make_mesh(layout, range(layout.pp), [device])


def _main(capability: tuple[int, int], cases: list[Any]) -> list[Any]:
    set_up(capability)
    dist.Backend.backend_capability["fake"].append("gpu")
    parallelize_module._to_empty = _to_empty
    torch.library.register_fake("c10d::allreduce_coalesced_", lambda *_: FakeWork().boxed())
    results: list[Any] = []
    for function, arguments in cases:
        try:
            results.append(globals()[function](**arguments))
        except Exception as error:
            traceback.print_exc()
            results.append({"error": f"{type(error).__name__}: {error}"})
    return results


if __name__ == "__main__":
    print(json.dumps(_main(*json.loads(sys.stdin.read())), default=lambda value: None), flush=True)
    os._exit(0)  # torch's autograd thread for this device sometimes aborts the interpreter's ordinary end
