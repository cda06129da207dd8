"""Continuous batching: every text of a batch that others join and leave equals its own single run."""

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from fira.decoding.decoding import continuation
from fira.decoding.sampling import Sampling
from fira.serving.row_sampling import RowSampler
from fira.serving.running_batch import RunningBatch, Text
from tests.fira.decoding.small_models import small

FAMILIES = ["fira", "rish", "mooshak", "blues", "microrwkv"]
GREEDY = Sampling(temperature=0)
# A text is moved to the left every 64 steps of the batch; some of these runs are longer.
Request = tuple[list[int], int, Sampling]


def sampler(sampling: Sampling) -> RowSampler:
    return RowSampler(sampling, torch.device("cpu"))


def requests(count: int, seq_len: int, vocabulary: int, sampling: Sequence[Sampling], seed: int = 0) -> list[Request]:
    """Prompts of all lengths, and numbers of tokens up to the end of the context."""
    rng = random.Random(seed)
    made = []
    for number in range(count):
        prompt = [rng.randrange(vocabulary) for _ in range(rng.randint(1, seq_len))]
        longest = seq_len - len(prompt) + 1
        tokens = rng.choice([1, longest, rng.randint(1, longest)])
        made.append((prompt, tokens, sampling[number % len(sampling)]))
    return made


def single(model: Any, request: Request) -> list[int]:
    prompt, count, sampling = request
    return [new[0] for new in continuation(model, [prompt], count, sampling)]


def batched(model: Any, wanted: Sequence[Request], rows: int, piece: int = 1000) -> tuple[list[list[int]], set[int]]:
    """The continuations of texts that run in at most `rows` rows, and the sizes of the batch."""
    batch, waiting, sizes = RunningBatch(model, rows), list(enumerate(wanted)), set()
    results: dict[int, list[int]] = {}
    running: dict[int, tuple[Text, Request]] = {}
    while waiting or running:
        if waiting and len(running) < rows:
            number, request = waiting.pop(0)
            text = Text(list(request[0]), sampler(request[2]))
            while batch.read_prompt(text, piece) is None:
                if batch.texts:
                    end(batch, running, results, batch.step())
            running[number] = text, request
            batch.join(text)
            end(batch, running, results)
        if batch.texts:
            sizes.add(len(batch.texts))
            end(batch, running, results, batch.step())
    assert batch.cache.length == 0
    return [results[number] for number in range(len(wanted))], sizes


def end(batch: RunningBatch, running: dict, results: dict, _: Any = None) -> None:
    for number, (text, (prompt, count, _sampling)) in list(running.items()):
        if len(text.tokens) == len(prompt) + count:
            results[number] = text.tokens[len(prompt) :]
            batch.leave(text)
            del running[number]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_texts_equal_their_single_runs(family: str) -> None:
    """In double precision, so that no two logits differ by less than a rounding error."""
    model = small(family)
    wanted = requests(24, model.config.seq_len, 50, [GREEDY])
    results, sizes = batched(model, wanted, rows=5)
    assert results == [single(model, request) for request in wanted]
    assert sizes >= {2, 3, 4, 5}
    assert len({tuple(result) for result in results}) > 10


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_in_pieces_and_other_options(family: str) -> None:
    """Rows differ in their sampling options, and each draws from its own generator."""
    model = small(family, seq_len=30)
    options = [
        GREEDY,
        Sampling(seed=1, top_p=0.9),
        Sampling(seed=2, temperature=1.5, top_k=20),
        Sampling(seed=3, repetition_penalty=1.3),
        Sampling(seed=4, top_p=0.9),
        Sampling(temperature=0, presence_penalty=0.5),
    ]
    wanted = requests(12, 30, 50, options)
    assert batched(model, wanted, rows=8, piece=7)[0] == [single(model, request) for request in wanted]


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_that_are_read_together_equal_single_runs(family: str) -> None:
    model = small(family, seq_len=30)
    made = requests(40, 30, 50, [GREEDY, Sampling(seed=1, top_p=0.9)])
    wanted = [request for request in made if request[1] > 5]
    batch = RunningBatch(model, len(wanted))
    texts = [Text(list(prompt), sampler(sampling)) for prompt, _, sampling in wanted]
    batch.read_prompts(texts)
    for text in texts:
        batch.join(text)
    for _ in range(min(count for _, count, _ in wanted) - 1):
        batch.step()
    assert len(texts) > 5
    for text, request in zip(texts, wanted, strict=True):
        new = text.tokens[len(request[0]) :]
        assert new == single(model, request)[: len(new)]


def test_a_rotary_base_that_grows_with_each_text() -> None:
    """Rotated keys depend on the length of their own text, not on that of the longest in the batch."""
    model = small("rish", max_position=6)
    wanted = requests(12, model.config.seq_len, 50, [GREEDY])
    assert batched(model, wanted, rows=4)[0] == [single(model, request) for request in wanted]


def test_one_text_is_computed_as_in_a_single_run() -> None:
    """A batch of one text has no mask: even in single precision its logits are bitwise identical."""
    model = small("blues").float()
    batch, text = RunningBatch(model, 3), Text([3, 1, 4], sampler(Sampling(seed=5)))
    batch.read_prompt(text, 100)
    batch.join(text)
    for _ in range(8):
        batch.step()
    assert text.tokens[3:] == single(model, ([3, 1, 4], 9, Sampling(seed=5)))


def test_expert_counts_are_those_of_the_texts_own_tokens() -> None:
    model = small("fira")
    counts = []
    for others in (0, 3):
        batch = RunningBatch(model, 4)
        texts = [Text([7, 8, 9], sampler(GREEDY), experts={}), *(Text([n], sampler(GREEDY)) for n in range(others))]
        for text in texts:
            batch.read_prompt(text, 100)
            batch.join(text)
        for _ in range(5):
            batch.step()
        counts.append({layer: count.tolist() for layer, count in texts[0].experts.items()})
    assert counts[0] == counts[1]
    assert [sum(count) for count in counts[0].values()] == [5 * model.config.top_k] * 2


@torch.inference_mode()
def test_texts_are_moved_to_the_left_when_the_buffers_are_full() -> None:
    model = small("mooshak")
    batch = RunningBatch(model, 2)
    wanted = requests(60, model.config.seq_len, 50, [GREEDY], seed=1)
    expected = [single(model, request) for request in wanted]
    assert sum(map(len, expected)) > 3 * batch.cache._columns
    assert batched(model, wanted, rows=2)[0] == expected
