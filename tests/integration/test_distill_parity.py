"""Distillation against a plain loop in float64, in every layout, with 3 and 5 micro-batches.

The loop runs each sequence of the global batch alone through written-out models of teacher and student, of different
families.
"""

import functools
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from fira.data.loader import Loader
from fira.data.text_windows import TextWindows
from fira.models.fira import FiraConfig
from fira.models.mooshak import MooshakConfig
from fira.models.registry import to_document
from pipeline.schedule import SCHEDULES
from tests.integration.test_reference_training import assembled
from tests.launch import run_function
from tests.ranks.distill_ranks import ORDER, TEMPERATURE
from tests.ranks.parity_ranks import Tokens
from tests.reference_models import FAMILIES

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]  # the first test waits for all trainings

SMALL: dict[str, Any] = {"vocab_size": 61, "seq_len": 13, "num_layers": 3}
TEACHER = MooshakConfig(**SMALL, d_model=18, n_head=3, n_kv_head=3, d_ff=14)
STUDENT = FiraConfig(**SMALL, d_model=12, n_head=3, d_ff=10, dropout=0.0, switch_coefficient=0.1)
BATCH = 5  # sequences in a step: 5 micro-batches of one, or 3 of two with the last one padded
# layout, schedule, sequences in a micro-batch, k, β
Case = tuple[tuple[int, int, int], str, int, int, float]
CASES: list[Case] = [
    *(((1, 1, 1), "1f1b", 1, k, beta) for k, beta in product((5, 61), (0.0, 0.4, 1.0))),
    *(((2, 1, 1), schedule, size, 5, 0.0) for schedule, size in product(SCHEDULES, (1, 2))),
    *(((1, 2, ep), "1f1b", size, 5, beta) for ep, size, beta in product((1, 2), (1, 2), (0.4, 1.0))),
    *(((2, 2, 2), schedule, size, 5, 0.4) for schedule, size in product(("1f1b", "zb-v"), (1, 2))),
]


@functools.cache
def job(ranks: int) -> dict[Case, list[dict[str, Any]]]:
    """The results of each rank for all cases with this number of ranks, in one job."""
    cases = [case for case in CASES if case[0][0] * case[0][1] == ranks]
    arguments = [
        {
            "teacher": to_document(TEACHER),
            "student": to_document(STUDENT),
            "layout": layout,
            "k": k,
            "beta": beta,
            "microbatch": size,
            "batch": BATCH,
            "schedule": schedule,
        }
        for layout, schedule, size, k, beta in cases
    ]
    by_rank = run_function(ranks, "tests.ranks.distill_ranks", "train_all", timeout=150, cases=arguments)
    return dict(zip(cases, zip(*by_rank, strict=True), strict=True))


def results(case: Case) -> list[dict[str, Any]]:
    return job(case[0][0] * case[0][1])[case]


def divergence(teacher: torch.Tensor, student: torch.Tensor, beta: float) -> torch.Tensor:
    """Of probabilities [T, n], as in the paper."""
    if beta in (0, 1):
        p, q = (teacher, student) if beta == 0 else (student, teacher)
        return (p * (p / q).log()).sum(-1)
    m = beta * teacher + (1 - beta) * student
    parts = ((beta, teacher), (1 - beta, student))
    return sum(factor * (p * (p / m).log()).sum(-1) for factor, p in parts)  # type: ignore[return-value]


@functools.cache
def plain(k: int, beta: float) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The step of the plain loop, from the weights of the run on one rank."""
    first = results(CASES[0])
    teacher = assembled(first, "teacher")
    p = {key: value.requires_grad_() for key, value in assembled(first, "student").items()}
    windows = TextWindows(Tokens(61), 13)  # type: ignore[arg-type]
    rows = Loader(windows, ORDER).batch(0, BATCH)
    loss, aux, nats = torch.zeros(3, dtype=torch.float64)
    for ids, targets in zip(torch.from_numpy(rows.tokens), torch.from_numpy(rows.targets), strict=True):
        with torch.no_grad():
            expected, _ = FAMILIES["mooshak"](ids, teacher, TEACHER)
        logits, auxiliary = FAMILIES["fira"](ids, p, STUDENT)
        top = expected.topk(k).indices
        events = []
        for z in (expected, logits):
            chances = (z / TEMPERATURE).softmax(-1)
            kept = chances.gather(1, top)
            events.append(torch.cat([kept, *([1 - kept.sum(1, keepdim=True)] if k < 61 else [])], 1))
        events[0] = events[0].log().float().double().exp()  # as it is stored
        loss = loss + divergence(*events, beta).sum() / (targets.numel() * BATCH)
        nats = nats + torch.nn.functional.cross_entropy(logits.detach(), targets) / BATCH
        aux = aux + auxiliary / BATCH
    (loss + aux).backward()
    gradients = {key: value.grad if value.grad is not None else torch.zeros_like(value) for key, value in p.items()}
    norm = sum(float(value.square().sum()) for value in gradients.values()) ** 0.5
    return [loss.item(), aux.item(), norm, nats.item()], gradients


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_step_equals_the_plain_loop(case: Case) -> None:
    ranks = results(case)
    expected, gradients = plain(*case[3:])
    for rank in ranks:
        np.testing.assert_allclose(rank["step"], expected, rtol=1e-12)
    together = assembled(ranks, "gradients")
    assert together.keys() == gradients.keys()
    for key, value in gradients.items():
        torch.testing.assert_close(
            together[key], value, rtol=0, atol=1e-12 * expected[2], msg=lambda m, key=key: f"{key}: {m}"
        )


def test_layouts_are_bitwise_identical() -> None:
    for size in (1, 2):
        steps = {}
        for case in CASES:
            if case[2] == size:
                steps.setdefault(case[3:], []).extend(rank["step"] for rank in results(case))
        for same in steps.values():
            assert all(step == same[0] for step in same)
