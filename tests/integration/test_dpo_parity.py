"""Direct preference optimisation against a plain loop in float64, in every layout, with 3 and 5 micro-batches.

The loop has no packing, no padding and no micro-batches: it runs each chat of the global batch alone through a
written-out model, and sums the log-probabilities of its answer. The reference is a model with other weights, because
with the initial ones all rewards are zero.
"""

import functools
from itertools import cycle, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from fira.data.loader import Loader
from fira.data.tokenizer import TOKENIZER, train_tokenizer
from fira.models.registry import to_document
from fira.posttraining.chat_corpus import prepare_chats
from fira.posttraining.packed_examples import PackedExamples
from fira.training.config import DPO_LOSSES
from pipeline.schedule import SCHEDULES
from tests.integration.test_reference_training import assembled
from tests.launch import run_function
from tests.preferences import Document, documents_in, encode_pair, make_preferences, write_preferences
from tests.ranks.dpo_ranks import ORDER
from tests.reference_models import FAMILIES, Parameters
from tests.small_chat_models import MODELS, SMALL, TOLERANCE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]  # the first test waits for all trainings

BATCH, BETA = 5, 0.3  # sequences in a step: 5 micro-batches of one, or 3 of two with the last one padded
COUNT = 16  # pairs
ONE = (1, 1, 1)
# family, layout, schedule, sequences in a micro-batch, dtype, loss
Case = tuple[str, tuple[int, int, int], str, int, str, str]


def cases() -> list[Case]:
    layouts: list[Any] = [
        *(("fira", (2, 1, 1), schedule, size, "float64") for schedule, size in product(SCHEDULES, (1, 2))),
        *(("fira", layout, "1f1b", size, "float64") for layout, size in product([(1, 2, 1), (1, 2, 2)], (1, 2))),
        *(("fira", layout, "1f1b", 1, "float32") for layout in [(2, 1, 1), (1, 2, 1), (1, 2, 2)]),
        *((name, (2, 1, 1), "1f1b", 1, "float64") for name in MODELS if name != "fira"),
        *(("fira", (2, 2, 2), schedule, size, "float64") for schedule, size in product(("1f1b", "zb-v"), (1, 2))),
        ("fira", (2, 2, 2), "interleaved", 1, "float32"),
    ]
    single = [("fira", ONE, "1f1b", size, dtype) for size, dtype in ((1, "float64"), (2, "float64"), (1, "float32"))]
    others = [(name, ONE, "1f1b", 1, "float64", loss) for name, loss in zip(MODELS, cycle(DPO_LOSSES), strict=False)]
    return [
        *((*case, loss) for case, loss in product(single, DPO_LOSSES)),
        *others[1:],
        *((*case, loss) for case, loss in zip(layouts, cycle(DPO_LOSSES), strict=False)),
    ]


CASES = cases()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """A vocabulary of bytes."""
    return train_tokenizer([], SMALL["vocab_size"])


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packed pairs."""
    place = tmp_path_factory.mktemp("preferences")
    tokenizer.save(str(place / TOKENIZER))
    data = write_preferences(place / "data.jsonl", make_preferences(COUNT))
    return prepare_chats(
        str(data), place / TOKENIZER, 261, SMALL["seq_len"], place / "cache", progress=False, pairs=True
    ).folder


@functools.cache
def job(folder: Path, ranks: int) -> dict[Case, list[dict[str, Any]]]:
    """The results of each rank for all cases with this number of ranks, in one job."""
    cases = [case for case in CASES if case[1][0] * case[1][1] == ranks]
    arguments = [
        {
            "model": to_document(MODELS[name]),
            "layout": layout,
            "folder": str(folder),
            "loss": loss,
            "beta": BETA,
            "microbatch": size,
            "batch": BATCH,
            "dtype": dtype,
            "schedule": schedule,
        }
        for name, layout, schedule, size, dtype, loss in cases
    ]
    by_rank = run_function(ranks, "tests.ranks.dpo_ranks", "train_all", timeout=150, cases=arguments)
    return dict(zip(cases, zip(*by_rank, strict=True), strict=True))


def results(folder: Path, case: Case) -> list[dict[str, Any]]:
    return job(folder, case[1][0] * case[1][1])[case]


def batch(folder: Path, tokenizer: Tokenizer) -> list[tuple[Document, Document]]:
    """The pairs of the global batch: those whose tokens the sequences contain, next to each other, encoded here."""
    encoded = [encode_pair(tokenizer, preference) for preference in make_preferences(COUNT)]
    by_tokens = {(chosen[0], rejected[0]): (chosen, rejected) for chosen, rejected in encoded}
    loader = Loader(PackedExamples(folder, "train-0", SMALL["seq_len"]), ORDER)
    return [
        by_tokens[pair]
        for documents in documents_in(loader.batch(0, BATCH))
        for pair in zip(documents[::2], documents[1::2], strict=True)
    ]


def answer(name: str, p: Parameters, document: Document) -> tuple[Tensor, int, Tensor]:
    """Log-probability and number of tokens of the answer in a chat, and the auxiliary loss."""
    ids, trained = torch.tensor(document[0]), torch.tensor(document[1])
    logits, aux = FAMILIES[name](ids, p, MODELS[name])
    logs = torch.log_softmax(logits[:-1], -1)[torch.arange(len(ids) - 1), ids[1:]]
    return logs[trained[1:]].sum(), int(trained[1:].sum()), aux


def loss_of(kind: str, chosen: Tensor, rejected: Tensor, tokens: tuple[int, int]) -> Tensor:
    """The loss of a pair, from the log-ratios of its answers to the reference."""
    if kind == "sigmoid":
        return torch.log1p(torch.exp(-BETA * (chosen - rejected)))
    difference = chosen / tokens[0] - rejected / tokens[1]
    if kind == "sigmoid-norm":
        return torch.log1p(torch.exp(-BETA * difference))
    return (difference - 1 / (2 * BETA)) ** 2


def plain_step(
    case: Case, reference: Parameters, weights: Parameters, pairs: list[tuple[Document, Document]]
) -> tuple[list[float], Parameters]:
    """Loss, auxiliary loss, gradient norm and metrics of a global batch, and the gradients."""
    name, kind = case[0], case[-1]
    p = {key: value.clone().requires_grad_() for key, value in weights.items()}
    total = sum(len(ids) for pair in pairs for ids, _ in pair)
    loss, aux = torch.zeros(2, dtype=torch.float64)
    metrics = np.zeros(6)
    for pair in pairs:
        logs, tokens, auxiliary = zip(*(answer(name, p, document) for document in pair), strict=True)
        with torch.no_grad():
            expected = [answer(name, reference, document)[0] for document in pair]
        chosen, rejected = (log - before for log, before in zip(logs, expected, strict=True))
        loss = loss + loss_of(kind, chosen, rejected, tokens) / len(pairs)
        aux = aux + sum(a * len(ids) for a, (ids, _) in zip(auxiliary, pair, strict=True)) / total
        rewards = BETA * chosen.item(), BETA * rejected.item()
        accuracy, margin = float(rewards[0] > rewards[1]), rewards[0] - rewards[1]
        metrics += np.array([*rewards, accuracy, margin, *(log.item() for log in logs)]) / len(pairs)
    (loss + aux).backward()
    gradients = {key: torch.zeros_like(value) if value.grad is None else value.grad for key, value in p.items()}
    norm = sum(float(value.square().sum()) for value in gradients.values()) ** 0.5
    return [loss.item(), aux.item(), norm, *metrics], gradients


@functools.cache
def plain(folder: Path, tokenizer: Tokenizer, name: str, dtype: str, loss: str) -> tuple[list[float], Parameters]:
    """The step of the plain loop, from the weights of the run on one rank."""
    first = next(case for case in CASES if (case[0], case[1], case[4]) == (name, ONE, dtype))
    reference, weights = (assembled(results(folder, first), which) for which in ("reference", "model"))
    return plain_step((*first[:-1], loss), reference, weights, batch(folder, tokenizer))


def test_batch_has_several_pairs_per_sequence_uneven_answers_and_padding(folder: Path, tokenizer: Tokenizer) -> None:
    pairs = batch(folder, tokenizer)
    assert len(pairs) > 1.3 * BATCH
    assert sum(len(ids) for pair in pairs for ids, _ in pair) < BATCH * SMALL["seq_len"]
    answers = [[sum(trained) for _, trained in pair] for pair in pairs]
    assert {np.sign(chosen - rejected) for chosen, rejected in answers} >= {-1, 1}


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_step_equals_the_plain_loop(case: Case, folder: Path, tokenizer: Tokenizer) -> None:
    name, _, _, _, dtype, loss = case
    tolerance, ranks = TOLERANCE[dtype], results(folder, case)
    expected, gradients = plain(folder, tokenizer, name, dtype, loss)
    for rank in ranks:
        np.testing.assert_allclose(rank["step"][:3], expected[:3], rtol=tolerance, atol=0)
        # Rewards are differences of log-probabilities, which have the rounding errors of these.
        np.testing.assert_allclose(rank["step"][3:], expected[3:], rtol=tolerance, atol=tolerance * abs(expected[-1]))
    together = assembled(ranks, "gradients")
    assert together.keys() == gradients.keys()
    for key, value in gradients.items():
        torch.testing.assert_close(
            together[key], value, rtol=0, atol=tolerance * expected[2], msg=lambda m, key=key: f"{key}: {m}"
        )


def test_metrics_are_those_of_the_loop(folder: Path) -> None:
    (rank,) = results(folder, CASES[0])
    rewards = ["reward_chosen", "reward_rejected", "reward_accuracy", "reward_margin"]
    assert rank["metrics"] == [*rewards, "logp_chosen", "logp_rejected"]
    assert 0 < rank["step"][5] < 1


@pytest.mark.parametrize("name", MODELS)
def test_reference_is_that_of_the_loop_and_bitwise_identical_in_every_layout(
    name: str, folder: Path, tokenizer: Tokenizer
) -> None:
    for size, dtype in product((1, 2), TOLERANCE):
        same = [case for case in CASES if (case[0], case[3], case[4]) == (name, size, dtype)]
        logs = [rank["logs"] for case in same for rank in results(folder, case)]
        assert all(one == logs[0] for one in logs)
        if not same:
            continue
        weights = assembled(results(folder, same[0]), "reference")
        packed = PackedExamples(folder, "train-0", SMALL["seq_len"])
        by_tokens = {
            document[0]: document
            for preference in make_preferences(COUNT)
            for document in encode_pair(tokenizer, preference)
        }
        written = [text for row in documents_in(packed.rows(range(len(packed)), len(packed))) for text in row]
        with torch.no_grad():
            expected = [float(answer(name, weights, by_tokens[text])[0]) for text in written]
        np.testing.assert_allclose(logs[0], expected, rtol=TOLERANCE[dtype])
