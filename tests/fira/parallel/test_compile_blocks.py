"""Compiled parts of blocks: which they are, how often they are compiled, and that they compute the same."""

import copy
import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fira.errors import UserError
from fira.models.language_model import LanguageModel
from fira.models.registry import FAMILIES, PRESETS, build, to_document
from fira.nn.context import Context, TrainingContext
from fira.nn.moe.experts import ExpertBank
from fira.parallel.compile_blocks import check_compiler, compile_blocks
from pipeline.split_backward import SplitBackward
from tests.fira.nn.packed_documents import pack
from tests.launch import run_function

LENGTH, SEQUENCES = 13, 4  # the length of parity_ranks
# Graphs of a model with any number of blocks: its `compilable` methods, and the router's
GRAPHS = {"fira": 3, "rish": 3, "mooshak": 1, "blues": 3, "microrwkv": 2}
SMALL: dict[str, Any] = {"vocab_size": 61, "seq_len": LENGTH, "d_model": 24, "num_layers": 3}
OTHERS = [name for name in FAMILIES if name != "fira"]
OPTIONS: dict[str, dict[str, Any]] = {
    "fira": {"n_head": 3, "d_ff": 20, "dropout": 0.2, "noise": 0.3, "balance_rate": 0.05, "capacity_factor": 0.9},
    "rish": {"n_head": 6, "n_kv_head": 2, "d_ff": 20, "max_position": 10},
    "mooshak": {"n_head": 6, "d_ff": 20},
    "blues": {"n_head": 6, "n_kv_head": 2, "d_ff": 20, "dropout": 0.2, "noise": 0.5},
    "microrwkv": {"n_head": 3, "n_group": 2, "window": 5, "d_moe": 10},
}
CONFIGS = {name: replace(PRESETS[f"{name}-tiny"], **SMALL, **options) for name, options in OPTIONS.items()}


@pytest.fixture(autouse=True)
def counters() -> Iterator[Any]:
    from torch._dynamo.utils import counters

    counters.clear()
    yield counters
    torch.compiler.reset()


def models(family: str, backend: str, dtype: torch.dtype = torch.float32) -> tuple[LanguageModel, LanguageModel]:
    """A model and a compiled copy of it."""
    plain = build(CONFIGS[family]).to(dtype)
    compiled = copy.deepcopy(plain)
    compile_blocks(compiled.modules(), LENGTH, backend)
    return plain, compiled


def context(sequences: int) -> Context:
    keys, lengths = torch.arange(sequences) << 40, torch.full((sequences,), LENGTH)
    context = Context(keys=keys, lengths=lengths, tokens=tokens(sequences))
    context.training.aux_weights = torch.ones(sequences)
    return context


def tokens(sequences: int) -> Tensor:
    return torch.arange(sequences * LENGTH).square().view(sequences, LENGTH) % SMALL["vocab_size"]


def gradients(model: LanguageModel, sequences: int = SEQUENCES) -> dict[str, Tensor]:
    """The logits and the gradients of all parameters in training."""
    model.zero_grad()
    logits = model(tokens(sequences), context(sequences))
    logits.square().mean().backward()
    return {"logits": logits.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def largest_error(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest distance of any tensor, relative to the largest norm of a gradient, or to that of the logits."""
    scale = max(float(value.norm()) for name, value in other.items() if name != "logits")
    errors = [float((one[name] - value).norm()) / scale for name, value in other.items() if name != "logits"]
    return max(*errors, float((one["logits"] - other["logits"]).norm() / other["logits"].norm()))


@pytest.mark.parametrize("family", ["fira", *(pytest.param(f, marks=pytest.mark.slow) for f in OTHERS)])
def test_one_graph_serves_all_blocks(family: str, counters: Any) -> None:
    """No graph breaks, one graph per method for all blocks, and none for other sizes, evaluation or decoding."""
    plain, compiled = models(family, "eager")
    for sequences in (SEQUENCES, SEQUENCES, SEQUENCES - 1):
        expected = gradients(plain, sequences)
        for name, value in gradients(compiled, sequences).items():
            assert torch.equal(value, expected[name]), name
    with torch.no_grad():
        assert torch.equal(compiled(tokens(3), Context()), plain(tokens(3), Context()))
    prompt = tokens(1)[:, :5].tolist()
    assert compiled.generate(prompt, 3, temperature=0) == plain.generate(prompt, 3, temperature=0)
    assert counters["stats"]["unique_graphs"] == GRAPHS[family]
    assert not counters["graph_break"]
    assert list(compiled.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("family", ["fira", *(pytest.param(f, marks=pytest.mark.slow) for f in OTHERS)])
def test_one_graph_serves_packed_documents_of_any_number(family: str, counters: Any) -> None:
    plain, compiled = models(family, "eager")
    for sizes in ([13], [5, 8], [1, 2, 3, 4]):
        documents = pack([sizes] * SEQUENCES, LENGTH)
        keys = torch.arange(SEQUENCES * len(sizes)).view(SEQUENCES, -1) << 40
        training = TrainingContext(aux_weights=torch.ones(SEQUENCES, len(sizes)))
        context = Context(documents=documents, keys=keys, training=training)
        assert torch.equal(compiled(tokens(SEQUENCES), context), plain(tokens(SEQUENCES), context))
    assert counters["stats"]["unique_graphs"] == GRAPHS[family]
    assert not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["fira", "mooshak"])
def test_split_backward_of_compiled_blocks(family: str) -> None:
    """A compiled function computes all of its gradients in the first part; experts compute theirs in the second."""
    _, model = models(family, "aot_eager")
    blocks = model.layers[1:3]
    banks = [module for module in blocks.modules() if isinstance(module, ExpertBank)]
    late = {p for bank in banks for p in bank.parameters(recurse=False)}
    x = torch.randn(SEQUENCES, LENGTH, SMALL["d_model"], requires_grad=True)

    def forward() -> Tensor:
        batch, y = context(SEQUENCES), x
        for block in blocks:
            y = block(y, batch)
        return y

    grad = torch.randn(x.shape)
    forward().backward(grad)
    expected = [x.grad, *(p.grad for p in blocks.parameters())]
    blocks.zero_grad()
    split = SplitBackward(forward(), x)
    actual = [split.backward_input(grad)]
    matrices = {p for p in blocks.parameters() if p.dim() > 1}
    assert {p for p in matrices if p.grad is None} == {p for p in late if p.dim() > 1}
    split.backward_weight()
    actual += [p.grad for p in blocks.parameters()]
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


def test_missing_compiler_is_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("backend='inductor' raised:\nInvalidCxxCompiler: no compiler\n\nSet TORCHDYNAMO_VERBOSE=1")

    monkeypatch.setattr(torch, "compile", fail)
    with pytest.raises(UserError, match=r"--compile: .*\(InvalidCxxCompiler: no compiler\); install a C\+\+ compiler"):
        check_compiler(torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("family", "backend"), [("mooshak", "inductor"), *((f, "aot_eager") for f in FAMILIES)])
def test_compiled_code_computes_the_same(family: str, backend: str) -> None:
    """With dropout and routing noise: in float64 a single different mask would exceed the bound.

    Inductor takes minutes for all families; aot_eager runs the same graphs without generating code.
    """
    plain, compiled = models(family, backend, torch.float64)
    assert largest_error(gradients(compiled), gradients(plain)) < 1e-12


LAYOUTS: dict[str, dict[str, Any]] = {
    "recompute": {"layout": [1, 1, 1], "recompute": 99},
    "torchgpipe recompute": {"layout": [1, 1, 1], "devices": 2, "recompute": 1},
    "1f1b": {"layout": [2, 1, 1]},
    "zb-v": {"layout": [2, 1, 1], "schedule": "zb-v"},
    "zb-h1 recompute": {"layout": [2, 1, 1], "schedule": "zb-h1", "recompute": 1},
    "experts": {"layout": [1, 2, 2]},
}


@functools.cache
def trained(ranks: int) -> dict[tuple[str, str | None], Any]:
    """Loss, auxiliary loss and gradient norm of three steps in all layouts for this number of ranks, by compiler."""
    keys = [
        (name, compiler)
        for compiler in (None, "aot_eager")
        for name, case in LAYOUTS.items()
        if np.prod(case["layout"][:2]) == ranks
    ]
    common = {"model": to_document(CONFIGS["fira"]), "microbatch": 2, "dtype": "float64", "steps": 3}
    cases = [{**common, **LAYOUTS[name], "compiler": compiler} for name, compiler in keys]
    results = run_function(ranks, "tests.ranks.parity_ranks", "train_all", timeout=250, cases=cases)[0]
    return {key: result["steps"] for key, result in zip(keys, results, strict=True)}


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name: str) -> None:
    results = trained(int(np.prod(LAYOUTS[name]["layout"][:2])))
    np.testing.assert_allclose(results[name, "aot_eager"], results[name, None], rtol=1e-12)
