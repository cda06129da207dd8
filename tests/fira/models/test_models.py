"""fira compared with `tests/reference.py` and finite differences; causality, padding, experts and micro-batches."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from fira import FIRA, create_pipeline_model
from fira.models.fira import FiraConfig
from fira.models.registry import PRESETS, build, from_document, to_document
from fira.nn.context import Context, TrainingContext
from fira.nn.cross_entropy import LOGITS, linear_cross_entropy
from fira.nn.moe.layer import MoE, Router
from tests import reference

CONFIG = FiraConfig(vocab_size=13, seq_len=9, d_model=8, n_head=2, num_layers=2, d_ff=12, dropout=0.0)
LENGTHS = [9, 5]


def make_model(config: FiraConfig = CONFIG, dtype: torch.dtype = torch.float64) -> FIRA:
    """A model whose parameters all differ from special initial values, such as a bias of zero."""
    torch.manual_seed(0)
    model = FIRA(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def make_moe(top_k: int = 2, num_experts: int = 4, width: int = 6) -> MoE:
    """The MoE layer of a block, with parameters from N(0, 1)."""
    config = replace(CONFIG, d_model=width, n_head=1, d_ff=5, num_experts=num_experts, top_k=top_k)
    torch.manual_seed(1)
    moe = FIRA(config).layers[1].moe.double()
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.normal_()
    return moe


def batch(config: FiraConfig = CONFIG, lengths: list[int] = LENGTHS) -> tuple[Tensor, Tensor, Context]:
    """Tokens, targets (−100 in the padding) and the context for training."""
    torch.manual_seed(2)
    tokens = torch.randint(config.vocab_size, (len(lengths), config.seq_len))
    targets = torch.randint(config.vocab_size, tokens.shape)
    valid = torch.tensor(lengths)
    targets[torch.arange(config.seq_len) >= valid[:, None]] = -100
    return tokens, targets, Context(lengths=valid, training=TrainingContext(aux_weights=valid / sum(lengths)))


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@pytest.mark.parametrize("logits", [256 * 7, 2**20])
def test_linear_cross_entropy_equals_cross_entropy_of_logits(logits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one block, and in several with a shorter last one; some targets are ignored."""
    monkeypatch.setitem(LOGITS, "cpu", logits)
    torch.manual_seed(0)
    targets = torch.randint(7, (600,))
    targets[::5] = -100
    leaves = [torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for n in (600, 7)]
    losses = [
        linear_cross_entropy(*leaves, targets),
        F.cross_entropy(leaves[0] @ leaves[1].T, targets, reduction="sum"),
    ]
    gradients = [torch.autograd.grad(0.3 * loss, leaves) for loss in losses]
    torch.testing.assert_close(*losses, rtol=1e-13, atol=0)
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    with torch.no_grad():
        assert linear_cross_entropy(*leaves, targets) == losses[0]


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_model_equals_reference_implementation(top_k: int, dtype: torch.dtype, tolerance: float) -> None:
    config = replace(CONFIG, top_k=top_k, aux_coefficient=0.7)
    model = make_model(config, dtype)
    tokens, targets, context = batch(config)
    logits = model(tokens, context)
    mean_loss(logits, targets).backward()

    p = {name: value.detach().double().requires_grad_() for name, value in model.named_parameters()}
    expected, balance = reference.fira(tokens, p, config, LENGTHS)
    aux = (balance * context.training.aux_weights).sum()
    (mean_loss(expected, targets) + aux).backward()

    assert (logits - expected).abs().max() < tolerance * expected.abs().max()
    assert sum(float(s.aux) for s in context.training.stats.values()) == pytest.approx(aux.item(), rel=tolerance)
    for name, parameter in model.named_parameters():
        assert p[name].grad.abs().max() > 0, f"{name} has no gradient in this test"
        assert (parameter.grad - p[name].grad).abs().max() < tolerance * max(1.0, p[name].grad.abs().max()), name


def test_router_gradient_against_finite_differences() -> None:
    torch.manual_seed(0)
    router = Router(5, 4, 2).double()
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    weight, bias = (p.detach().clone().requires_grad_() for p in router.parameters())

    def weights(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functional_call(router, {"gate.weight": weight, "gate.bias": bias}, (x,))[1]

    assert gradcheck(weights, (x, weight, bias))


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_dispatch_gradient_against_finite_differences(top_k: int) -> None:
    torch.manual_seed(0)
    moe = make_moe(top_k, width=3)
    names = [name for name, _ in moe.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in moe.parameters()]
    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)

    def output(x: Tensor, *values: Tensor) -> Tensor:
        return functional_call(moe, dict(zip(names, values, strict=True)), (x, Context(), None))

    assert gradcheck(output, (x, *values))


def test_auxiliary_gradient_against_finite_differences() -> None:
    """The auxiliary loss is not part of the output, but gradients are those of the sum of output and loss."""
    moe = make_moe()
    x = torch.randn(3, 5, 6, dtype=torch.float64)

    def objective() -> tuple[Tensor, float]:
        context = Context(training=TrainingContext(aux_weights=torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)))
        y = moe(x, context, None).square().sum()
        return y, y.item() + context.training.stats[1, 0].aux.item()

    objective()[0].backward()
    weight = moe.router.gate.weight
    for entry in [(0, 0), (1, 3), (3, 5)]:
        values = []
        for change in (1e-6, -1e-6):
            with torch.no_grad():
                weight[entry] += change
                values.append(objective()[1])
                weight[entry] -= change
        assert (values[0] - values[1]) / 2e-6 == pytest.approx(float(weight.grad[entry]), rel=1e-6)


def test_expert_gradients_equal_reference_and_are_zero_without_tokens() -> None:
    moe = make_moe(num_experts=5)
    with torch.no_grad():
        moe.router.gate.bias[3] = -1e3  # expert 3 is not chosen by any token
    x = torch.randn(2, 6, 6, dtype=torch.float64)
    moe(x, Context(), None).square().sum().backward()

    p = {name: value.detach().clone().requires_grad_() for name, value in moe.named_parameters()}
    sum(reference.experts(sequence, p, 2, 1)[0].square().sum() for sequence in x).backward()
    for name in ("w1", "b1", "w2", "b2"):
        grad = getattr(moe.experts, name).grad
        for e in range(5):
            torch.testing.assert_close(grad[e], p[f"experts.{name}"].grad[e], rtol=1e-10, atol=1e-10)
            assert bool((grad[e] == 0).all()) == (e == 3)


@pytest.mark.parametrize("top_k", [1, 3])
def test_experts_compute_only_their_tokens(top_k: int) -> None:
    moe = make_moe(top_k)
    x = torch.randn(4, 8, 6, dtype=torch.float64)
    with FlopCounterMode(display=False) as flops:
        moe(x, Context(), None)
    tokens = 4 * 8
    assert flops.get_total_flops() == tokens * (2 * 6 * 4 + top_k * 2 * 2 * 6 * 5)  # router and two products

    chosen = moe.router(x.flatten(0, 1))[0]
    with torch.no_grad():
        moe.experts.w1[2] = torch.nan
    is_nan = moe(x, Context(), None).flatten(0, 1).isnan().any(1)
    assert is_nan.any()
    assert not is_nan.all()
    assert torch.equal(is_nan, (chosen == 2).any(1))


@pytest.mark.parametrize(("top_k", "tolerance"), [(2, 1e-13), (CONFIG.num_experts, 0.0)])
def test_no_information_flows_from_later_tokens_or_other_sequences(top_k: int, tolerance: float) -> None:
    """Bitwise if every expert is chosen by every token. Otherwise the changed token can be routed to other experts,
    and the order of summation in a product depends on its number of rows."""
    model = make_model(replace(CONFIG, top_k=top_k))
    tokens = batch()[0]
    before = model(tokens)
    for t in range(tokens.shape[1]):
        changed = tokens.clone()
        changed[1, t] = (changed[1, t] + 1) % CONFIG.vocab_size
        difference = (model(changed) - before).abs()
        assert difference[0].max() <= tolerance
        assert difference[1, :t].sum() <= tolerance
        assert difference[1, t:].amax(1).min() > 1e-6  # later tokens do change


def test_logits_have_no_gradient_with_respect_to_later_tokens() -> None:
    model = make_model()
    tokens = batch()[0]
    embedded: list[Tensor] = []
    model.layers[0].register_forward_hook(lambda _module, _inputs, x: embedded.append(x))
    logits = model(tokens)
    for t in range(tokens.shape[1]):
        (gradient,) = torch.autograd.grad(logits[1, t].square().sum(), embedded, retain_graph=True)
        nonzero = gradient.abs().amax(2) > 0
        assert nonzero[1].tolist() == [s <= t for s in range(tokens.shape[1])]
        assert not nonzero[0].any()


def test_padding_does_not_affect_valid_tokens() -> None:
    results = []
    for padding in (0, 7):
        model = make_model()
        tokens, targets, context = batch()
        tokens[targets == -100] = padding
        logits = model(tokens, context)
        mean_loss(logits, targets).backward()
        results.append(
            (logits[targets != -100], context.training.stats, {n: p.grad for n, p in model.named_parameters()})
        )
    (logits, stats, grads), (other_logits, other_stats, other_grads) = results
    # Another padding token is routed to other experts, and rounding in a product depends on its number of rows.
    torch.testing.assert_close(logits, other_logits, rtol=1e-12, atol=1e-12)
    for key, expected in stats.items():
        assert torch.equal(expected.load, other_stats[key].load)
        assert expected.load.sum() == sum(LENGTHS) * 2
        torch.testing.assert_close(expected.aux, other_stats[key].aux, rtol=1e-12, atol=0)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, other_grads[name], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("sizes", [[1, 1, 1, 1], [3, 1], [2, 2]])
def test_auxiliary_loss_does_not_depend_on_micro_batches(sizes: list[int]) -> None:
    lengths = [9, 5, 7, 1]
    full, split = make_model(), make_model()
    tokens, _, context = batch(lengths=lengths)
    full(tokens, context).sum().backward()
    contexts = batch(lengths=lengths)[2].split(sizes)
    for chunk_context, chunk in zip(contexts, tokens.split(sizes), strict=True):
        split(chunk, chunk_context).sum().backward()
    for layer in (1, 2):
        stats = [contexts[0].training.stats[layer, chunk] for chunk in range(len(sizes))]
        assert sum(float(s.aux) for s in stats) == pytest.approx(float(context.training.stats[layer, 0].aux), rel=1e-12)
        assert torch.equal(sum(s.load for s in stats), context.training.stats[layer, 0].load)
    for (name, parameter), other in zip(full.named_parameters(), split.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize(("top_k", "active"), [(1, 162_771_504), (2, 219_440_688), (3, 276_109_872)])
def test_number_of_parameters_of_fira_base(top_k: int, active: int) -> None:
    with torch.device("meta"):
        model = build(replace(PRESETS["fira-base"], top_k=top_k))
    assert model.num_parameters() == 332_779_056
    assert model.num_active_parameters() == active


def test_top_k_may_be_a_fraction_of_the_experts() -> None:
    assert Router(8, 4, 0.8).top_k == 3
    assert Router(8, 4, 0.7).top_k == 2  # rounded down
    assert Router(8, 4, 1.0).top_k == 4
    assert Router(8, 4, 0.01).top_k == 1
    assert all(Router(1, e, n / e).top_k == n for e in range(1, 60) for n in range(1, e + 1))
    for top_k in (0, 5, 1.5):
        with pytest.raises(ValueError, match="top_k"):
            Router(8, 4, top_k)


def test_config_is_restored_from_json() -> None:
    config = replace(CONFIG, top_k=0.8, dropout=0.3)
    assert from_document(to_document(config)) == config


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("devices", [1, 3])
def test_pipeline_model_equals_plain_model(devices: int, recompute: bool) -> None:
    config = replace(CONFIG, dropout=0.2)
    tokens, targets, _ = batch(config)
    plain, split = make_model(config), make_model(config)
    pipelined = create_pipeline_model(split, ["cpu"] * devices, chunks=2, recompute=recompute)
    assert [name for name, _ in pipelined.named_parameters()] == [name for name, _ in plain.named_parameters()]
    logits = []
    for module in (plain, pipelined):
        torch.manual_seed(5)  # seeds the dropout of a call without context
        logits.append(module(tokens))
        mean_loss(logits[-1], targets).backward()
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-12, atol=1e-12)
    for parameter, other in zip(plain.parameters(), pipelined.parameters(), strict=True):
        torch.testing.assert_close(other.grad, parameter.grad, rtol=1e-10, atol=1e-12)
    assert not torch.equal(pipelined.eval()(tokens), logits[1])  # in eval mode there is no dropout


def test_pipeline_model_of_a_config_has_the_initial_values_of_the_model() -> None:
    tokens = batch()[0]
    pipelined = create_pipeline_model(CONFIG, ["cpu", "cpu"])
    torch.testing.assert_close(pipelined(tokens), FIRA(CONFIG)(tokens), rtol=1e-5, atol=1e-5)
