"""Packed requests, compared with a loop over single requests in float64."""

from itertools import chain
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from fira.data.tokenizer_config import default_config
from fira.errors import UserError
from fira.evaluation.likelihoods import PackedRequests, likelihoods
from fira.evaluation.local_model import LocalModel
from fira.evaluation.request_encoding import EncodedRequest, RequestEncoder
from fira.evaluation.task_evaluation import encode_task
from fira.evaluation.task_files import read_tasks
from fira.evaluation.task_forms import Likelihood
from fira.models.language_model import LanguageModel
from fira.nn.context import Context
from fira.nn.cross_entropy import IGNORE_INDEX
from tests.fira.evaluation.evaluation_examples import greedy_requests, model_with, write_tasks
from tests.fira.models.small_families import CONFIGS, make_model


def requests_of(folder: Path, tokenizer: Tokenizer, seq_len: int) -> list[EncodedRequest]:
    encoder = RequestEncoder(tokenizer, default_config(tokenizer), seq_len)
    tasks = [encode_task(task, encoder) for task in read_tasks(write_tasks(folder))]
    return [request for task in tasks for request in chain(*task.requests)]


@torch.no_grad()
def one_by_one(model: LanguageModel, request: EncodedRequest) -> Likelihood:
    """The sum of log-probabilities of the last tokens, from the logits of the request alone."""
    logs = model(torch.tensor([request.tokens[:-1]]), Context())[0].double().log_softmax(-1)
    total, greedy = 0.0, True
    for position in range(len(request.tokens) - 1 - request.scored, len(request.tokens) - 1):
        following = request.tokens[position + 1]
        total += float(logs[position, following])
        greedy = greedy and int(logs[position].argmax()) == following
    return Likelihood(total, greedy)


@pytest.mark.parametrize("batch", [1, 3, 50])
def test_answers_equal_those_of_single_requests(tokenizer: Tokenizer, tmp_path: Path, batch: int) -> None:
    model = model_with(tokenizer).double()
    requests = requests_of(tmp_path, tokenizer, 32)
    encoder = RequestEncoder(tokenizer, default_config(tokenizer), 32)
    requests += [encoder.request(request, "x") for request in greedy_requests(model, tokenizer)]
    assert len({request.truncated for request in requests}) == 2
    found = likelihoods(requests, 32, batch, LocalModel(model, batch).reports)
    assert len({answer.greedy for answer in found}) == 2
    for answer, request in zip(found, requests, strict=True):
        expected = one_by_one(model, request)
        assert answer.log_probability == pytest.approx(expected.log_probability, rel=1e-12)
        assert answer.greedy == expected.greedy


@pytest.mark.parametrize("name", CONFIGS)
def test_answers_of_every_family(name: str) -> None:
    model = make_model(CONFIGS[name])
    generator = torch.Generator().manual_seed(2)
    requests = []
    for number in range(12):
        length = 2 + number % 7
        tokens = torch.randint(model.config.vocab_size, (length,), generator=generator).tolist()
        requests.append(EncodedRequest(tokens, 1 + number % (length - 1), False))
    local = LocalModel(model, 2)
    for answer, request in zip(likelihoods(requests, local.seq_len, 2, local.reports), requests, strict=True):
        assert answer.log_probability == pytest.approx(one_by_one(model, request).log_probability, rel=1e-11)


def test_every_continuation_is_a_target_once(tokenizer: Tokenizer, tmp_path: Path) -> None:
    requests = requests_of(tmp_path, tokenizer, 32)
    packed = PackedRequests(requests, 32)
    assert len(packed) < len(requests)
    rows = packed.batch(0, len(packed))
    assert int((rows.targets != IGNORE_INDEX).sum()) == sum(request.scored for request in requests)
    found = [index for number in range(len(packed)) for index, _ in packed.spans(number)]
    assert sorted(found) == list(range(len(requests)))
    for number in range(len(packed)):
        for index, span in packed.spans(number):
            tokens, scored, _ = requests[index]
            assert rows.tokens[number, span].tolist() == tokens[:-1]
            assert rows.targets[number, span].tolist() == [IGNORE_INDEX] * (len(tokens) - 1 - scored) + tokens[-scored:]


def test_log_probability_that_is_not_finite_is_reported(tokenizer: Tokenizer) -> None:
    model = model_with(tokenizer)
    with torch.no_grad():
        model.layers[-1].get_parameter("project.weight").fill_(torch.nan)
    with pytest.raises(UserError, match="log-probability of the model is not finite"):
        likelihoods([EncodedRequest([5, 6], 1, False)], 32, 1, LocalModel(model, 1).reports)
