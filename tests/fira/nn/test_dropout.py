"""Statistics of dropout masks, which depend only on sequence, position, place and channel."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fira import FIRA
from fira.models.fira import FiraConfig
from fira.nn.context import Context
from fira.nn.dropout import Dropout, _mix, keep_mask, normal, token_keys

CONFIG = FiraConfig(vocab_size=11, seq_len=6, d_model=16, n_head=2, num_layers=2, d_ff=24, dropout=0.3)


def sequence_keys(count: int) -> Tensor:
    """Return large random keys, as in training."""
    return torch.randint(2**62, (count,), generator=torch.Generator().manual_seed(3))


def deviations(mask: Tensor, p: float) -> list[str]:
    """Return the deviations of a mask [R, C] from independent entries that are true with probability 1 − p.

    Each statistic is compared with its mean and standard deviation; values that are too small are reported as well.
    """
    rows, columns = mask.shape
    z = (mask.double() - (1 - p)) / math.sqrt(p * (1 - p))  # entries of mean 0 and variance 1
    found = []
    if abs(float(z.sum())) > 5 * math.sqrt(z.numel()):
        found.append(f"mean {float(mask.double().mean())}")
    for name, sums, n in (
        ("rows", z.sum(1) / math.sqrt(columns), rows),
        ("columns", z.sum(0) / math.sqrt(rows), columns),
    ):
        if abs(float(sums.square().sum()) - n) > 6 * math.sqrt(2 * n):  # χ² of n degrees of freedom
            found.append(f"sums of {name}")
    for name, x in (("rows", z), ("columns", z.T)):
        pairs = torch.triu(x @ x.T, diagonal=1) / math.sqrt(x.shape[1])  # each approximately normal
        count = len(x) * (len(x) - 1) / 2
        if float(pairs.abs().max()) > 7:
            found.append(f"a pair of {name} correlated")
        if abs(float(pairs.square().sum()) / count - 1) > 12 / math.sqrt(count):
            found.append(f"pairs of {name}")
    return found


def row_keys(count: int) -> Tensor:
    """Return row keys as the model computes them: consecutive positions of several sequences."""
    return token_keys(sequence_keys(8), 0, count // 8).flatten()


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_masks_are_statistically_random(p: float) -> None:
    assert deviations(keep_mask(row_keys(512), 384, p), p) == []


def test_small_and_neighbouring_sequence_keys_give_random_masks() -> None:
    keys = torch.arange(512)
    assert deviations(keep_mask(token_keys(keys, 3, 1)[:, 0], 384, 0.5), 0.5) == []
    assert deviations(keep_mask(token_keys(keys << 32, 3, 1)[:, 0], 384, 0.5), 0.5) == []


def test_places_are_independent() -> None:
    """The masks of one row at 256 places of a model are independent."""
    row, x = row_keys(8)[:1], torch.ones(1, 384)
    masks = torch.cat([Dropout(0.5, f"layers.{i}.dropout{j}")(x, row) > 0 for i in range(64) for j in range(4)])
    assert deviations(masks, 0.5) == []


def test_places_whose_salts_differ_like_two_channels_are_independent() -> None:
    """The key of row and place must not cancel in the exclusive or with the channel."""
    a, b = Dropout(0.5, "a"), Dropout(0.5, "b")
    first, second = _mix(torch.tensor([1, 2], dtype=torch.int32)).tolist()  # values of the first two channels
    b.salt = a.salt ^ first ^ second
    x, rows = torch.ones(512, 2), row_keys(512)
    assert deviations(torch.cat([a(x, rows), b(x, rows)], 1).T > 0, 0.5) == []


@pytest.mark.parametrize(
    "poor",
    [
        lambda r, c: (r[:, None] ^ c) >= 0,
        lambda r, c: (r[:, None] + c) * -1640531527 >= 0,
        lambda r, c: (r[:, None] * 7 + c * 13) % 2 == 0,
        lambda r, c: torch.rand(len(c), generator=torch.Generator().manual_seed(0)).expand(len(r), -1) > 0.5,
        lambda r, c: torch.rand(len(r), len(c), generator=torch.Generator().manual_seed(0)) > 0.48,
    ],
)
def test_poor_hashes_are_rejected(poor) -> None:
    """The statistics above reject masks that are not random."""
    assert deviations(poor(row_keys(512), torch.arange(384, dtype=torch.int32)), 0.5)


def test_kept_values_are_scaled_to_preserve_the_mean() -> None:
    x = torch.full((512, 384), 3.0)
    y = Dropout(0.25, "here")(x, row_keys(512))
    assert set(y.unique().tolist()) == {0.0, 4.0}
    assert float(y.mean()) == pytest.approx(3.0, abs=5 * 4 * math.sqrt(0.25 * 0.75 / x.numel()))


def test_no_dropout_without_keys_or_probability() -> None:
    x = torch.randn(4, 5)
    assert torch.equal(Dropout(0.5, "here")(x, None), x)
    assert torch.equal(Dropout(0.0, "here")(x, row_keys(8)[:4]), x)
    for wrong in (-0.1, 1.0):
        with pytest.raises(ValueError, match="dropout"):
            Dropout(wrong, "here")


def test_token_keys_do_not_depend_on_the_start_of_a_window() -> None:
    keys = sequence_keys(5)
    whole = token_keys(keys, 0, 40)
    assert torch.equal(token_keys(keys, 13, 20), whole[:, 13:33])
    assert len(whole.unique()) == whole.numel()


@pytest.mark.parametrize("sizes", [[1, 1, 1, 1], [3, 1], [2, 2]])
def test_masks_do_not_depend_on_the_batch_of_a_sequence(sizes: list[int]) -> None:
    model = FIRA(CONFIG).double()
    tokens = torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(0))
    context = Context(keys=sequence_keys(4))
    whole = model(tokens, context)
    pieces = [model(some, c) for some, c in zip(tokens.split(sizes), context.split(sizes), strict=True)]
    torch.testing.assert_close(torch.cat(pieces), whole, rtol=1e-12, atol=1e-12)
    for other in (Context(), Context(keys=sequence_keys(4).flip(0))):
        assert (model(tokens, other) - whole).abs().mean() > 0.01


def test_recomputing_a_layer_draws_the_same_masks() -> None:
    tokens = torch.randint(11, (3, 6), generator=torch.Generator().manual_seed(0))
    grads = []
    for recompute in (False, True):
        model, x, context = FIRA(CONFIG), tokens, Context(keys=sequence_keys(3))
        for layer in model.layers:
            x = (
                checkpoint(layer, x, context, use_reentrant=False, preserve_rng_state=False)
                if recompute
                else layer(x, context)
            )
            torch.rand(1)  # advances torch's generator, which must not matter
        x.square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_every_dropout_of_the_model_draws_a_different_mask() -> None:
    model = FIRA(replace(CONFIG, num_layers=5))
    salts = [module.salt for module in model.modules() if isinstance(module, Dropout)]
    assert len(salts) == 1 + 5 * 4
    assert len(set(salts)) == len(salts)


def test_a_token_has_different_masks_in_its_experts() -> None:
    model = FIRA(replace(CONFIG, num_experts=2, top_k=2)).train()
    moe = model.layers[1].moe
    seen: dict[str, Tensor] = {}
    moe.experts.register_forward_pre_hook(lambda _module, inputs: seen.update(keys=inputs[2]))
    tokens = torch.zeros(1, 6, dtype=torch.int64)
    model(tokens, Context(keys=sequence_keys(1)))
    first, second = keep_mask(seen["keys"], 384, 0.5).split(6)  # the rows of expert 0, then those of expert 1
    assert deviations(torch.cat([first, second]), 0.5) == []


def test_normal_has_the_moments_of_the_normal_distribution() -> None:
    """Compare the first four moments and the correlations of columns and rows, within five standard deviations."""
    x = normal(token_keys(torch.arange(2000) * 2**40 + 7, 0, 50).flatten(), 4)
    n = x.numel()
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float(x.pow(power).mean()) - mean) < 5 * math.sqrt(variance / n), power
    for a, b in ((x[:, 0], x[:, 1]), (x[:-1, 2], x[1:, 2]), (x[:-50, 3], x[50:, 3])):
        assert abs(float((a * b).mean())) < 5 / math.sqrt(len(a))
