"""Weights that are cast once for several calls, compared with plain autocast."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fira.models.adapters import add_adapters
from fira.models.language_model import LanguageModel
from fira.nn.context import Context, TrainingContext
from fira.nn.lora import Lora
from fira.parallel.cast_weights import cast_parameters, cast_weights
from pipeline.stage import DeviceLayers
from pipeline.torchgpipe_stage import LocalPipeline
from tests.fira.models import small_fira
from tests.fira.models.small_families import CONFIGS, make_model, make_tokens

BF16 = torch.bfloat16
MODELS = {**CONFIGS, "fira": small_fira.CONFIG}


class Casts(TorchDispatchMode):
    """Counts the casts of each of the given parameters."""

    def __init__(self, parameters: dict[str, Tensor]) -> None:
        super().__init__()
        self.names = {p.data_ptr(): name for name, p in parameters.items()}
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        source = {torch.ops.aten._to_copy.default: 0, torch.ops.aten.copy_.default: 1}.get(function)
        if source is not None and (name := self.names.get(args[source].data_ptr())):
            self.counts[name] = self.counts.get(name, 0) + 1
        return function(*args, **(kwargs or {}))


def run(layers: nn.Module, model: LanguageModel, calls: int, cast: bool, backward: bool = True) -> list[Tensor]:
    """Losses of several micro-batches, with their gradients added to the parameters' `.grad`."""
    with cast_weights(layers.modules()) if cast else nullcontext():
        losses = []
        for number in range(calls):
            tokens = (make_tokens(model.config, length=9) + number) % model.config.vocab_size
            lengths = torch.full((2,), tokens.shape[1])
            context = Context(lengths=lengths, tokens=tokens, training=TrainingContext(tokens))
            losses.append(layers(tokens, context).sum())
            if backward:
                losses[-1].backward()
    return losses


def matrices(model: LanguageModel) -> dict[str, Tensor]:
    """The parameters that are cast, by name."""
    names = {id(p): name for name, p in model.named_parameters()}
    found = [module.get_parameter(name) for layer in model.layers for module, name in cast_parameters(layer)]
    return {names[id(p)]: p for p in found}


@pytest.mark.parametrize("name", MODELS)
def test_each_matrix_that_autocast_casts_is_cast_once(name: str) -> None:
    """Whatever the number of micro-batches; vectors and biases are left to autocast."""
    model = make_model(MODELS[name], torch.float32)
    layers = DeviceLayers(model.layers, BF16)
    plain = Casts(dict(model.named_parameters()))
    with plain:
        run(layers, model, 1, cast=False)
    by_autocast = {n for n in plain.counts if model.get_parameter(n).dim() > 1 and not n.endswith((".b1", ".b2"))}
    assert set(matrices(model)) == by_autocast
    for calls in (1, 4):
        casts = Casts(matrices(model))
        with casts:
            run(layers, model, calls, cast=True)
        assert casts.counts == dict.fromkeys(by_autocast, 1), calls


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_are_bitwise_those_of_plain_autocast(name, dtype, recompute) -> None:
    results = []
    for cast in (False, True):
        model = make_model(MODELS[name], torch.float32)
        losses = run(DeviceLayers(model.layers, dtype, recompute), model, 3, cast)
        results.append([*losses, *(p.grad for p in model.parameters())])
    assert all(map(torch.equal, *results))
    assert all(gradient.dtype == torch.float32 for gradient in results[1][3:])


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_of_torchgpipe_chunks_are_summed_in_fp32(recompute: bool) -> None:
    results = []
    for cast in (False, True):
        model = make_model(MODELS["mooshak"], torch.float32)
        local = LocalPipeline(list(model.layers), [2, 2], ["cpu", "cpu"], 2, BF16, recompute)
        run(local, model, 1, cast)
        results.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("backward", [False, True])
def test_an_error_restores_the_parameters(backward: bool) -> None:
    model = make_model(MODELS["fira"], torch.float32)
    layers, before = DeviceLayers(model.layers, BF16), dict(model.named_parameters())

    def fail() -> None:
        with cast_weights(layers.modules()):
            run(layers, model, 1, cast=False, backward=backward)
            assert model.layers[1].moe.experts.w1.dtype == BF16
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert model.layers[-1].cast_weight is None
    assert not any(layer._forward_pre_hooks for layer in model.layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_autocast_nothing_is_changed(dtype: torch.dtype) -> None:
    model = make_model(MODELS["fira"], dtype)
    layers, parameters = DeviceLayers(model.layers), dict(model.named_parameters())
    with cast_weights(layers.modules()):
        assert all(p is parameters[name] for name, p in model.named_parameters())
        assert not any(layer._forward_pre_hooks for layer in model.layers)
        assert model.layers[-1].cast_weight is None


def test_evaluation_uses_the_copies() -> None:
    model = make_model(MODELS["fira"], torch.float32)
    layers = DeviceLayers(model.layers, BF16)
    casts = Casts(matrices(model))
    with torch.no_grad(), casts:
        once = run(layers, model, 3, cast=True, backward=False)
    assert set(casts.counts.values()) == {1}
    with torch.no_grad():
        assert once == run(layers, model, 3, cast=False, backward=False)


def test_hooks_of_a_parameter_are_called_when_its_gradient_is_complete() -> None:
    model = make_model(MODELS["mooshak"], torch.float32)
    gradients: dict[str, list[Tensor]] = {name: [] for name in dict(model.named_parameters())}
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: gradients[name].append(p.grad.clone()))
    run(DeviceLayers(model.layers, BF16), model, 2, cast=True)
    for name, parameter in model.named_parameters():
        assert len(gradients[name]) == 2, name
        assert torch.equal(gradients[name][1], parameter.grad)


@pytest.mark.parametrize("name", ["fira", "rish", "mooshak"])
def test_frozen_weights_are_cast_and_have_no_gradient(name: str) -> None:
    """Losses, and gradients of adapters, are bitwise those of plain autocast; the head sums its gradients in fp32."""
    results = []
    for cast in (False, True):
        model = make_model(MODELS[name], torch.float32)
        add_adapters(model, Lora(2, 4.0, ("attention", "experts", "head")))
        torch.manual_seed(0)
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.3)
        frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
        losses = run(DeviceLayers(model.layers, BF16), model, 3, cast)
        assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
        assert all(torch.equal(p, model.get_parameter(n)) for n, p in frozen.items())
        results.append([*losses, *(p.grad for p in model.parameters() if p.requires_grad)])
    assert all(map(torch.equal, *results))
