"""The memory of a layer's tensors, compared with what torch's profiler reports of the same layer."""

import pytest
import torch

from benchmarks.measure import peak_allocated
from fira.models.registry import build, make_config
from fira.nn.context import Context, TrainingContext
from fira.planner.model_profile import layer_memory, profile_of
from fira.planner.tensor_memory import AllocatedBytes
from pipeline.split_backward import SplitBackward, run_backward


@pytest.mark.parametrize("family", ["fira", "rish", "blues"])
def test_memory_of_layers_equals_that_of_torch(family):
    model = build(make_config(f"{family}-tiny", {"num_layers": 1}))
    with torch.device("meta"):
        profile = profile_of(build(model.config))
    tokens = torch.randint(profile.config.vocab_size, (4, profile.tokens))
    x = tokens
    for layer, kind in zip(model.layers, profile.layers, strict=True):
        context = Context(lengths=torch.full((4,), profile.tokens), keys=torch.arange(4), tokens=tokens)
        context.training = TrainingContext(tokens, aux_weights=torch.ones(4))
        x = x.detach().requires_grad_(x.is_floating_point())
        results: list[torch.Tensor] = []

        def forward(layer=layer, x=x, context=context, results=results) -> None:
            results[:] = [layer(x, context)]

        predicted = layer_memory(profile, kind, 4)
        assert predicted.forward == pytest.approx(peak_allocated(forward), rel=0.03)
        ones = torch.ones_like(results[0])  # in `predicted` it is allocated in the backward
        peak = peak_allocated(lambda results=results, ones=ones: run_backward([results[0]], [ones]))
        gradient = 0 if kind == profile.layers[-1] else ones.nbytes
        assert predicted.backward - gradient <= 1.03 * peak
        if x.requires_grad:
            layer.zero_grad()
            x.grad = None
            forward()
            split = SplitBackward(results.pop(), x)
            peak = peak_allocated(lambda split=split, ones=ones: split.backward_input(ones))
            assert predicted.backward_input - gradient <= 1.03 * peak + 1
        x = layer(x, context)


def test_storages_are_counted_once_and_until_they_are_freed():
    x = torch.ones(1000)
    with AllocatedBytes() as allocated:
        x.add_(1)
        assert allocated.now == 0  # a tensor of the caller
        y = x * 2
        z = y.view(10, 100).T
        assert allocated.now == 4000
        del y
        assert allocated.now == 4000
        del z
        assert (allocated.now, allocated.peak) == (0, 4000)
        x.exp().sin()  # the first result is needed for the second
        assert (allocated.restart(), allocated.peak) == (0, 0)
