"""A server in a thread of the test process, with real sockets."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import openai
import uvicorn
from tokenizers import Tokenizer

from fira.serving.app import create_app
from fira.serving.scheduler import Scheduler
from fira.serving.served_model import ServedModel
from tests.fira.small_model import CONFIG, make_model


@dataclass
class Served:
    """A running server."""

    url: str
    model: Any
    scheduler: Scheduler

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)


@contextmanager
def running(
    model: Any, rows: int = 32, queue: int = 64, key: str | None = None, origins: list[str] | None = None
) -> Iterator[Served]:
    scheduler = Scheduler(model, rows, queue)
    app = create_app(ServedModel(model, "small", rows), scheduler, key, origins or [])
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, log_level="error"))
    with socket.create_server(("127.0.0.1", 0), backlog=256) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield Served(f"http://127.0.0.1:{listening.getsockname()[1]}", model, scheduler)
        finally:
            server.should_exit = True
            thread.join(30)
    assert not thread.is_alive()


def served_model(tokenizer: Tokenizer) -> Any:
    """A model whose greedy answers do not depend on rounding errors, because it is in double precision."""
    model = make_model(replace(CONFIG, seq_len=200, dropout=0.0)).double()
    model.tokenizer = tokenizer
    return model
