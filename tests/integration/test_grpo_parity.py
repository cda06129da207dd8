"""GRPO against a plain loop in float64, in every layout, with 3 and 5 micro-batches.

The loop runs each sampled answer of the global batch alone, after its prompt, through a written-out model.
"""

import functools
import statistics
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import torch

from fira.models.fira import FiraConfig
from fira.models.registry import to_document
from pipeline.schedule import SCHEDULES
from tests.integration.test_reference_training import assembled
from tests.launch import run_function
from tests.ranks.grpo_ranks import EOS, Prompts, reward
from tests.reference_models import FAMILIES, Parameters

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]  # the first test waits for all trainings

CONFIG = FiraConfig(
    vocab_size=31, seq_len=26, num_layers=3, d_model=12, n_head=3, d_ff=10, dropout=0.0, switch_coefficient=0.1
)
# layout, schedule, answers to each prompt, sequences in a micro-batch, sequences in a step
Case = tuple[tuple[int, int, int], str, int, int, int]
THREE, FIVE = (3, 2, 6), (5, 1, 5)
CASES: list[Case] = [
    *(((1, 1, 1), "1f1b", *sizes) for sizes in (THREE, FIVE)),
    *(((2, 1, 1), schedule, *sizes) for schedule, sizes in zip(SCHEDULES, (THREE, FIVE) * 4, strict=False)),
    *(((1, 2, ep), "1f1b", *sizes) for ep in (1, 2) for sizes in (THREE, FIVE)),
    *(((2, 2, 2), schedule, *sizes) for schedule, sizes in (("1f1b", THREE), ("zb-v", FIVE))),
]
Documents = list[tuple[list[int], list[int]]]  # prompt and answer


@functools.cache
def job(ranks: int) -> dict[Case, list[dict[str, Any]]]:
    """The results of each rank for all cases with this number of ranks, in one job."""
    cases = [case for case in CASES if case[0][0] * case[0][1] == ranks]
    names = ("layout", "schedule", "group", "microbatch", "batch")
    arguments = [{"model": to_document(CONFIG), **dict(zip(names, case, strict=True))} for case in cases]
    by_rank = run_function(ranks, "tests.ranks.grpo_ranks", "train_all", timeout=150, cases=arguments)
    return dict(zip(cases, zip(*by_rank, strict=True), strict=True))


def results(case: Case) -> list[dict[str, Any]]:
    return job(case[0][0] * case[0][1])[case]


def documents(rows: list[np.ndarray]) -> list[Documents]:
    """Prompts and answers of each sequence, read token by token."""
    found: list[Documents] = []
    for tokens, targets, numbers in zip(*rows, strict=True):
        parts: dict[int, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
        before = -100
        for token, target, number in zip(tokens, targets, numbers, strict=True):
            if number >= 0:
                assert before in (-100, token)
                parts[number][int(before != -100)].append(int(token))
            before = target
        found.append([parts[number] for number in sorted(parts)])
    return found


def gains(case: Case) -> tuple[list[Documents], list[list[float]], list[list[float]]]:
    """The sampled documents of the batch, their rewards and their advantages."""
    _, _, group, _, batch = case
    sampled = documents([np.array(part) for part in results(case)[0]["rows"]])
    order = np.random.default_rng([3, 0]).permutation(4)  # of the loader
    prompts = Prompts(CONFIG.seq_len, CONFIG.vocab_size)
    rewards: list[list[float]] = []
    for number, answers in enumerate(sampled):
        originals = prompts._documents(int(order[number // group]))
        assert [prompt for prompt, _ in answers] == [original.prompt for original in originals]
        for (_, answer), original in zip(answers, originals, strict=True):
            assert answer[-1] == EOS or len(answer) == len(original.answer)
            assert EOS not in answer[:-1]
        rewards.append([reward(new[1], old.answer) for new, old in zip(answers, originals, strict=True)])
    advantages = []
    for number in range(batch):
        start = number // group * group
        columns = list(zip(*rewards[start : start + group], strict=True))
        advantages.append(
            [
                (own - statistics.mean(column)) / (statistics.stdev(column) + 1e-4)
                for own, column in zip(rewards[number], columns, strict=True)
            ]
        )
    return sampled, rewards, advantages


@functools.cache
def plain(group: int, microbatch: int, batch: int) -> tuple[list[float], Parameters]:
    """The step of the plain loop, from the weights of the run on one rank."""
    case = ((1, 1, 1), "1f1b", group, microbatch, batch)
    sampled, rewards, advantages = gains(case)
    p = {key: value.requires_grad_() for key, value in assembled(results(case), "weights").items()}
    loss, aux = torch.zeros(2, dtype=torch.float64)
    entropies, lengths, tokens = [], [], 0
    for answers, values in zip(sampled, advantages, strict=True):
        for (prompt, answer), advantage in zip(answers, values, strict=True):
            ids = torch.tensor(prompt + answer)
            logits, auxiliary = FAMILIES["fira"](ids, p, CONFIG)
            logs = logits.log_softmax(-1)[len(prompt) - 1 : -1]
            loss = loss - advantage * logs.gather(1, ids[len(prompt) :, None]).mean()
            aux = aux + auxiliary * len(ids)
            entropies.append(float(torch.distributions.Categorical(logits=logs.detach()).entropy().mean()))
            lengths.append(len(answer))
            tokens += len(ids)
    (loss / len(lengths) + aux / tokens).backward()
    gradients = {key: value.grad if value.grad is not None else torch.zeros_like(value) for key, value in p.items()}
    norm = sum(float(value.square().sum()) for value in gradients.values()) ** 0.5
    wrong = statistics.mean(1 - value for values in rewards for value in values)
    return [wrong, (aux / tokens).item(), norm, statistics.mean(entropies), statistics.mean(lengths)], gradients


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_step_equals_the_plain_loop(case: Case) -> None:
    ranks = results(case)
    expected, gradients = plain(*case[2:])
    assert 0 < expected[0] < 1
    for rank in ranks:
        assert rank["rows"] == results(((1, 1, 1), "1f1b", *case[2:]))[0]["rows"]
        np.testing.assert_allclose(rank["step"], expected, rtol=1e-12)
    together = assembled(ranks, "gradients")
    assert together.keys() == gradients.keys()
    for key, value in gradients.items():
        torch.testing.assert_close(
            together[key], value, rtol=0, atol=1e-12 * expected[2], msg=lambda m, key=key: f"{key}: {m}"
        )
