"""Predictions of llama.cpp at every position of a text, through the server of the package xllamacpp.

The server reports log-probabilities with a sampled token, if this token is whole text. A large bias makes it sample a
given token; the log-probabilities do not contain the bias.
"""

from pathlib import Path
from typing import Any

import numpy as np
import xllamacpp

WHOLE_TEXT = 5  # `!`, the first token after the special ones in a tokenizer of Fira


def start(path: Path, length: int) -> xllamacpp.Server:
    """Start llama.cpp on one thread in this process, with a context of `length` tokens."""
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx = params.n_batch = length
    params.n_parallel = params.cpuparams.n_threads = 1
    params.verbosity = -1
    params.warmup = False
    return xllamacpp.Server(params)


def predictions(server: xllamacpp.Server, ids: list[int]) -> np.ndarray:
    """For tokens 1 to T − 1, [T − 1, 2]: the most probable token, and the log-probability of the actual one.

    Both are NaN for tokens that are a part of a character.
    """
    rows = np.full((len(ids) - 1, 2), np.nan)
    for position, row in enumerate(rows, 1):
        reported = _next_token(server, ids[:position], sampled=ids[position], count=1)
        if reported is not None:
            row[:] = reported["top_logprobs"][0]["id"], reported["logprob"]
    return rows


def log_probabilities(server: xllamacpp.Server, ids: list[int], vocabulary: int) -> np.ndarray:
    """The log-probabilities [T, V] of all tokens after each of T tokens."""
    rows = np.full((len(ids), vocabulary), np.nan)
    for end, row in enumerate(rows, 1):
        reported = _next_token(server, ids[:end], WHOLE_TEXT, vocabulary)
        for entry in reported["top_logprobs"]:
            row[entry["id"]] = entry["logprob"]
    return rows


def _next_token(server: xllamacpp.Server, ids: list[int], sampled: int, count: int) -> Any:
    """What the server reports on the token after `ids`, with the `count` most probable ones."""
    request = {"prompt": ids, "max_tokens": 1, "temperature": 0, "logprobs": count, "cache_prompt": True}
    logprobs = complete(server, request | {"logit_bias": {str(sampled): 1e4}})["logprobs"]
    return None if logprobs is None else logprobs["content"][0]


def complete(server: xllamacpp.Server, request: dict[str, Any]) -> dict[str, Any]:
    """The first choice of a completion, or of an answer if the request has messages, and its `usage`."""
    handle = server.handle_chat_completions if "messages" in request else server.handle_completions
    answer = handle(request)
    if "choices" not in answer:
        raise RuntimeError(f"llama.cpp: {answer}")
    return {**answer["choices"][0], "usage": answer["usage"]}
