"""The server as its clients see it: OpenAI's client, and requests that no client would send."""

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from tokenizers import Tokenizer

import fira
from fira.decoding.decoding import continuation
from fira.decoding.sampling import Sampling
from fira.generation.conversation import Conversation
from fira.generation.text import continue_text
from fira.serving import scheduler as scheduler_module
from tests.fira.serving.running_server import Served, running, served_model


@pytest.fixture(scope="module")
def small_model(tokenizer: Tokenizer) -> Any:
    return served_model(tokenizer)


@pytest.fixture(scope="module")
def served(small_model: Any) -> Iterator[Served]:
    with running(small_model) as server:
        yield server


HELLO = [{"role": "user", "content": "def main"}]


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def single(model: Any, prompt: str, count: int, **options: Any) -> str:
    return "".join(continue_text(model, fira.encode(prompt, model.tokenizer), count, **options))


def test_answer_equals_that_of_the_chat_command(served):
    expected = "".join(Conversation(served.model).ask("def main", 30, temperature=0))
    answer = served.client().chat.completions.create(model="small", messages=HELLO, temperature=0, max_tokens=30)
    (choice,) = answer.choices
    assert choice.message.content == expected
    assert choice.finish_reason == ("length" if answer.usage.completion_tokens == 30 else "stop")
    assert answer.usage.prompt_tokens == len(
        fira.encode("<|prompter|>def main</s><|assistant|>", served.model.tokenizer)
    )
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_stream_has_the_pieces_of_the_answer_and_its_usage(served):
    arguments = {"model": "small", "messages": HELLO, "seed": 3, "max_completion_tokens": 40}
    whole = served.client().chat.completions.create(**arguments)
    chunks = list(
        served.client().chat.completions.create(**arguments, stream=True, stream_options={"include_usage": True})
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == whole.choices[0].message.content
    assert sum(bool(c.choices[0].delta.content) for c in chunks[:-1]) > 10
    assert [c.choices[0].finish_reason for c in chunks[-2:-1]] == [whole.choices[0].finish_reason]
    assert chunks[-1].usage == whole.usage
    assert {c.usage for c in chunks[:-1]} == {None}


def test_characters_are_never_cut_and_stop_texts_never_shown(served, tokenizer):
    """Single bytes of the vocabulary are generated; a piece of the stream must contain complete characters."""
    text = single(served.model, "नमस्ते", 60, seed=5, temperature=1.5)
    stop = text[20:24]
    expected = text[: text.index(stop)]
    arguments = {"model": "small", "prompt": "नमस्ते", "seed": 5, "temperature": 1.5, "max_tokens": 60}
    pieces = [
        chunk.choices[0] for chunk in served.client().completions.create(**arguments, stop=[stop, "…"], stream=True)
    ]
    assert "".join(piece.text for piece in pieces) == expected
    assert pieces[-1].finish_reason == "stop"
    assert served.client().completions.create(**arguments).choices[0].text == text


def test_several_prompts_and_choices_equal_single_runs_with_their_seeds(served):
    prompts = ["def", "Wald"]
    answer = served.client().completions.create(model="small", prompt=prompts, n=3, seed=7, top_p=0.9, max_tokens=12)
    expected = [single(served.model, prompt, 12, seed=7 + i, top_p=0.9) for prompt in prompts for i in range(3)]
    assert [choice.text for choice in answer.choices] == expected
    assert [choice.index for choice in answer.choices] == list(range(6))
    tokens = [fira.encode(prompt, served.model.tokenizer) for prompt in prompts]
    again = served.client().completions.create(model="small", prompt=tokens, n=3, seed=7, top_p=0.9, max_tokens=12)
    assert [choice.text for choice in again.choices] == expected
    assert answer.usage.prompt_tokens == sum(map(len, tokens))


def test_options_that_openai_does_not_have(served):
    options = {"top_k": 5, "repetition_penalty": 1.3, "min_p": 0.01}
    answer = served.client().completions.create(
        model="small", prompt="def", seed=1, max_tokens=20, presence_penalty=0.4, extra_body=options
    )
    assert answer.choices[0].text == single(served.model, "def", 20, seed=1, presence_penalty=0.4, **options)


def test_text_ends_with_the_context(served):
    """A text has one token more than the model can read."""
    tokens = [*range(5, 195)]
    answer = served.client().completions.create(model="small", prompt=tokens, temperature=0, max_tokens=500)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.total_tokens == 201
    ids = [new[0] for new in continuation(served.model, [tokens], 11, Sampling(temperature=0))]
    assert len(ids) == answer.usage.completion_tokens


def test_concurrent_clients_get_the_answers_of_single_runs(served):
    prompts, client = [f"def f{number}" + "Wald " * (number % 7) for number in range(32)], served.client()

    def ask(prompt: str) -> str:
        arguments = {"model": "small", "prompt": prompt, "temperature": 0, "max_tokens": 5 + len(prompt)}
        return client.completions.create(**arguments).choices[0].text

    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(ask, prompts))
    assert answers == [single(served.model, prompt, 5 + len(prompt), temperature=0) for prompt in prompts]
    assert served.scheduler.load() == (0, 0)


@pytest.mark.parametrize(
    ("change", "status", "message", "param"),
    [
        ({"messages": []}, 400, "at least 1 item", "messages"),
        ({"messages": "Hi"}, 400, "valid list", "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "'system', 'developer'", "messages.0.role"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "surrogates", "messages.0.content"),
        ({"messages": [{"role": "user", "content": "Wald " * 300}]}, 400, "context of 200", "messages"),
        ({"model": "gpt"}, 404, "use 'small'", "model"),
        ({"temperature": -1}, 400, "temperature: give a number of at least 0", "temperature"),
        ({"temperature": float("nan")}, 400, "temperature: give", "temperature"),
        ({"presence_penalty": 1e308}, 400, "presence_penalty: give", "presence_penalty"),
        ({"messages": [{"role": "user", "content": 5}]}, 400, "none of the types", "messages.0.content"),
        ({"top_p": 2}, 400, "top_p: give", "top_p"),
        ({"max_tokens": 0}, 400, "greater than or equal to 1", "max_tokens"),
        ({"max_tokens": "5"}, 400, "valid integer", "max_tokens"),
        ({"n": 33}, 400, "at most 32", "n"),
        ({"stop": ["a"] * 5}, 400, "at most 4", "stop"),
        ({"stop": ""}, 400, "at least 1 item", "stop"),
        ({"seed": -1}, 400, "seed: give", "seed"),
        ({"temprature": 1}, 400, "not permitted", "temprature"),
        ({"tools": [{"type": "function"}]}, 400, "tools is not supported", "tools"),
        ({"logprobs": True}, 400, "logprobs is not supported", "logprobs"),
    ],
    ids=str,
)
def test_invalid_fields_are_refused_in_the_form_of_the_api(served, change, status, message, param):
    body = json.dumps({"messages": HELLO, "model": "small"} | change)
    reply = httpx.post(f"{served.url}/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    error = reply.json()["error"]
    assert reply.status_code == status
    assert message in error["message"]
    assert (error["param"] or "").startswith(param)
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("method", "path", "content", "status"),
    [
        ("POST", "/v1/completions", b"nonsense", 400),
        ("POST", "/v1/completions", b"", 400),
        ("POST", "/v1/completions", b"[]", 400),
        ("POST", "/v1/completions", b"[" * 100_000, 400),
        ("POST", "/v1/completions", b'{"prompt": []}', 400),
        ("POST", "/v1/completions", b'{"prompt": [1, 300]}', 400),
        ("POST", "/v1/completions", b'{"prompt": "' + b"a" * 2**20 + b'"}', 413),
        ("POST", "/v1/completions", iter([b'{"prompt": "', b"a" * 2**20, b'"}']), 413),  # without Content-Length
        ("GET", "/v1/completions", b"", 405),
        ("GET", "/v1/nothing", b"", 404),
        ("GET", "/v1/models/gpt", b"", 404),
    ],
)
def test_invalid_requests_are_refused_in_the_form_of_the_api(served, method, path, content, status):
    headers = {"Content-Type": "application/json"}
    reply = httpx.request(method, served.url + path, content=content, headers=headers)
    assert reply.status_code == status
    assert reply.json()["error"].keys() == {"message", "type", "param", "code"}


def test_fields_without_an_effect_are_accepted(served):
    messages = [{"role": "user", "content": [{"type": "text", "text": "def main"}]}]
    options = {"n": 1, "frequency_penalty": 0, "logit_bias": {}, "user": "me", "response_format": {"type": "text"}}
    answers = [
        served.client().chat.completions.create(model="small", messages=texts, max_tokens=5, temperature=0, **more)
        for texts, more in ((messages, options), (HELLO, {}))
    ]
    assert answers[0].choices == answers[1].choices
    messages += [answers[0].choices[0].message.model_dump(), HELLO[0]]  # with fields that are null
    assert served.client().chat.completions.create(model="small", messages=messages, max_tokens=5).choices


def test_models_health_and_page(served):
    assert [model.id for model in served.client().models.list()] == ["small"]
    assert served.client().models.retrieve("small").owned_by == "fira"
    assert httpx.get(f"{served.url}/health").json() == {"status": "ok", "running": 0, "waiting": 0}
    page = httpx.get(served.url)
    assert "<title>Fira chat</title>" in page.text
    assert "default-src 'none'" in page.headers["content-security-policy"]


def test_experts_are_counted_on_request(served):
    body = {"messages": HELLO, "max_tokens": 9, "temperature": 0, "return_experts": True}
    reply = httpx.post(f"{served.url}/v1/chat/completions", json=body).json()
    decoded = reply["usage"]["completion_tokens"] - 1  # the last token is not read
    assert {layer: sum(counts) for layer, counts in reply["experts"].items()} == {"1": 2 * decoded, "2": 2 * decoded}
    del body["return_experts"]
    assert "experts" not in httpx.post(f"{served.url}/v1/chat/completions", json=body).json()


def test_key_is_required(small_model):
    with running(small_model, key="secret", origins=["http://a.example"]) as server:
        for key in ("wrong", "secrets", "secre"):
            with pytest.raises(openai.AuthenticationError, match="wrong or missing API key"):
                server.client(key).chat.completions.create(model="small", messages=HELLO)
        assert httpx.post(f"{server.url}/v1/completions", content=b"nonsense").status_code == 401
        assert server.client("secret").completions.create(model="small", prompt="def").choices
        assert httpx.get(f"{server.url}/health").status_code == 200
        for origin, allowed in (("http://a.example", True), ("http://b.example", False)):
            reply = httpx.get(f"{server.url}/health", headers={"Origin": origin})
            assert ("access-control-allow-origin" in reply.headers) is allowed


def wait_between_steps(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Slow down the model."""
    step = scheduler_module.RunningBatch.step

    def slow(batch: Any) -> list[int]:
        time.sleep(seconds)
        return step(batch)

    monkeypatch.setattr(scheduler_module.RunningBatch, "step", slow)


def test_requests_beyond_the_queue_are_refused_and_clients_that_leave_free_their_places(small_model, monkeypatch):
    wait_between_steps(monkeypatch, 0.05)
    with running(small_model, rows=2, queue=1) as server:
        client, options = server.client(), {"model": "small", "prompt": "def", "max_tokens": 190, "temperature": 0}
        streams = [client.completions.create(**options, stream=True) for _ in range(3)]
        next(iter(streams[0]))
        wait_for(lambda: server.scheduler.load() == (2, 1))
        with pytest.raises(openai.RateLimitError, match="too many requests") as refused:
            client.completions.create(**options)
        assert refused.value.code == "rate_limit_exceeded"
        assert refused.value.response.headers["retry-after"]
        for stream in streams:  # also of the one that waits
            stream.close()
        wait_for(lambda: server.scheduler.load() == (0, 0))
        with pytest.raises(openai.APITimeoutError):  # without a stream
            client.with_options(timeout=0.3).completions.create(**options)
        wait_for(lambda: server.scheduler.load() == (0, 0))
        assert client.completions.create(model="small", prompt="def", max_tokens=2).choices


def test_failure_of_the_model_ends_requests_with_an_error_and_the_server_continues(small_model, monkeypatch, caplog):
    with running(small_model) as server:
        with monkeypatch.context() as patch:
            patch.setattr(scheduler_module.RunningBatch, "step", lambda batch: 1 / 0)
            with pytest.raises(openai.InternalServerError, match="the model failed"):
                server.client().completions.create(model="small", prompt="def")
            stream = server.client().completions.create(model="small", prompt="def", stream=True)
            with pytest.raises(openai.APIError, match="the model failed"):
                list(stream)
        expected = single(small_model, "def", 16, temperature=0)
        assert (
            server.client().completions.create(model="small", prompt="def", temperature=0).choices[0].text == expected
        )
    assert "ZeroDivisionError" in caplog.text


def test_draining_server_finishes_answers_within_the_limit(small_model, monkeypatch):
    wait_between_steps(monkeypatch, 0.05)
    with running(small_model) as server:
        options = {"model": "small", "prompt": "def", "temperature": 0, "stream": True}
        client = server.client()
        long, short = (client.completions.create(**options, max_tokens=count) for count in (190, 10))
        server.scheduler.drain(60)
        with pytest.raises(openai.InternalServerError, match="shutting down"):
            client.completions.create(model="small", prompt="def")
        assert "".join(chunk.choices[0].text for chunk in short) == single(small_model, "def", 10, temperature=0)
        server.scheduler.drain(0)
        with pytest.raises(openai.APIError, match="shutting down"):
            list(long)


def test_description_of_the_api_declares_the_statuses_of_errors(served):
    described = httpx.get(f"{served.url}/openapi.json").json()["paths"]
    assert described.keys() == {"/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/models/{name}", "/health"}
    for operation in (operation for operations in described.values() for operation in operations.values()):
        assert operation["responses"].keys() == {"200", "4XX", "5XX"}  # 422 of FastAPI is answered with 400
