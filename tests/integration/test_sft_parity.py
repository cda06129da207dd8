"""Supervised fine-tuning against a plain loop in float64, in every layout, with 3 and 5 micro-batches.

The loop has no packing, no padding and no micro-batches: it runs each chat of the global batch alone through a
written-out model, and divides the summed cross-entropy of the answers by their number of tokens.
"""

import functools
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from fira.data.loader import Loader
from fira.data.tokenizer import TOKENIZER, train_tokenizer
from fira.models.registry import to_document
from fira.posttraining.chat_corpus import prepare_chats
from fira.posttraining.packed_examples import PackedExamples
from pipeline.schedule import SCHEDULES
from tests.chats import EncodedMessages, encode, make_chats, write_chats
from tests.integration.test_reference_training import assembled
from tests.launch import run_function
from tests.ranks.sft_ranks import SEED
from tests.reference_models import FAMILIES, Parameters
from tests.small_chat_models import MODELS, SMALL, TOLERANCE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]  # the first test waits for all trainings

BATCH, STEPS = 5, 2  # sequences in a step: 5 micro-batches of one, or 3 of two with the last one padded
ONE = (1, 1, 1)
# family, layout, schedule, sequences in a micro-batch, dtype
Case = tuple[str, tuple[int, int, int], str, int, str]
CASES: list[Case] = [
    *((name, ONE, "1f1b", 2, dtype) for name, dtype in product(MODELS, TOLERANCE)),
    *(("fira", (2, 1, 1), schedule, size, "float64") for schedule, size in product(SCHEDULES, (1, 2))),
    *(("fira", layout, "1f1b", size, "float64") for layout, size in product([(1, 2, 1), (1, 2, 2)], (1, 2))),
    *(("fira", layout, "1f1b", 1, "float32") for layout in [(2, 1, 1), (1, 2, 1), (1, 2, 2)]),
    *((name, (2, 1, 1), "1f1b", 1, "float64") for name in MODELS if name != "fira"),
    *(("fira", (2, 2, 2), schedule, size, "float64") for schedule, size in product(("1f1b", "zb-v"), (1, 2))),
    ("fira", (2, 2, 2), "interleaved", 1, "float32"),
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """A vocabulary of bytes."""
    return train_tokenizer([], SMALL["vocab_size"])


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packed chats."""
    place = tmp_path_factory.mktemp("chats")
    tokenizer.save(str(place / TOKENIZER))
    data = write_chats(place / "chats.jsonl", make_chats(60))
    return prepare_chats(str(data), place / TOKENIZER, 261, SMALL["seq_len"], place / "cache", progress=False).folder


@functools.cache
def job(folder: Path, ranks: int) -> dict[Case, list[dict[str, Any]]]:
    """The results of each rank for all cases with this number of ranks, in one job."""
    cases = [case for case in CASES if case[1][0] * case[1][1] == ranks]
    arguments = [
        {
            "model": to_document(MODELS[name]),
            "layout": layout,
            "folder": str(folder),
            "microbatch": size,
            "batch": BATCH,
            "steps": STEPS,
            "dtype": dtype,
            "schedule": schedule,
        }
        for name, layout, schedule, size, dtype in cases
    ]
    by_rank = run_function(ranks, "tests.ranks.sft_ranks", "train_all", timeout=120, cases=arguments)
    return dict(zip(cases, zip(*by_rank, strict=True), strict=True))


@functools.cache
def batches(folder: Path, tokenizer: Tokenizer) -> list[list[EncodedMessages]]:
    """The chats of each global batch: those whose tokens the sequences contain, encoded here."""
    encoded = {tuple(ids): (ids, trained) for ids, trained in (encode(tokenizer, chat) for chat in make_chats(60))}
    loader = Loader(PackedExamples(folder, "train-0", SMALL["seq_len"]), SEED)
    result = []
    for step in range(STEPS):
        rows = loader.batch(step * BATCH, BATCH)
        packed = [
            tuple(tokens[numbers == number].tolist())
            for tokens, numbers in zip(rows.tokens, rows.documents, strict=True)
            for number in range(numbers.max() + 1)
        ]
        result.append([encoded[ids] for ids in packed])
    return result


def plain_step(name: str, initial: Parameters, chats: list[EncodedMessages]) -> tuple[list[float], Parameters]:
    """Loss, auxiliary loss and gradient norm of a global batch, and the gradients."""
    p = {key: value.clone().requires_grad_() for key, value in initial.items()}
    targets = sum(sum(trained[1:]) for _, trained in chats)
    tokens = sum(len(ids) for ids, _ in chats)
    loss = aux = torch.zeros((), dtype=torch.float64)
    for ids, trained in chats:
        chat = torch.tensor(ids)
        logits, chat_aux = FAMILIES[name](chat, p, MODELS[name])
        answers = torch.tensor(trained[1:])
        loss = loss + F.cross_entropy(logits[:-1][answers], chat[1:][answers], reduction="sum") / targets
        aux = aux + chat_aux * len(ids) / tokens
    (loss + aux).backward()
    gradients = {key: torch.zeros_like(value) if value.grad is None else value.grad for key, value in p.items()}
    norm = sum(float(value.square().sum()) for value in gradients.values()) ** 0.5
    return [loss.item(), aux.item(), norm], gradients


@functools.cache
def reference(folder: Path, tokenizer: Tokenizer, name: str) -> list[tuple[list[float], Parameters]]:
    initial = assembled(job(folder, 1)[name, ONE, "1f1b", 2, "float64"], "initial")
    return [plain_step(name, initial, chats) for chats in batches(folder, tokenizer)]


def test_batches_have_uneven_chats_and_padding(folder: Path, tokenizer: Tokenizer) -> None:
    for chats in batches(folder, tokenizer):
        lengths = [len(ids) for ids, _ in chats]
        assert len(chats) > 2 * BATCH
        assert max(lengths) > 3 * min(lengths)
        assert sum(lengths) < BATCH * SMALL["seq_len"]
        assert 0.2 < np.mean([flag for _, trained in chats for flag in trained]) < 0.8


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_step_equals_the_plain_loop(case: Case, folder: Path, tokenizer: Tokenizer) -> None:
    name, layout, _, _, dtype = case
    ranks = job(folder, layout[0] * layout[1])[case]
    tolerance = TOLERANCE[dtype]
    for step, (results, gradients) in enumerate(reference(folder, tokenizer, name)):
        for rank in ranks:
            np.testing.assert_allclose(rank["steps"][step], results, rtol=tolerance, atol=0)
        found = assembled([{"gradients": rank["gradients"][step]} for rank in ranks], "gradients")
        assert found.keys() == gradients.keys()
        for key, value in gradients.items():
            torch.testing.assert_close(
                found[key], value, rtol=0, atol=tolerance * results[2], msg=lambda m, key=key: f"{key}: {m}"
            )
