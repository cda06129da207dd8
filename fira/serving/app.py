"""The routes of the server."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.middleware.cors import CORSMiddleware
from starlette.types import Receive, Scope, Send

from fira.serving.api_answers import Answer
from fira.serving.api_errors import ERROR_RESPONSES, add_error_handlers
from fira.serving.api_requests import ChatRequest, CompletionRequest, GenerationRequest
from fira.serving.choice import Choice
from fira.serving.middleware import LimitBody, LogRequests, RequireKey
from fira.serving.scheduler import Scheduler
from fira.serving.served_model import ServedModel

BODY_BYTES = 2**20  # of a request
PAGE = Path(__file__).with_name("chat_page.html")
# The page contains its script and its style, and connects to this server only.
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; connect-src 'self'; img-src data:; "
    "script-src 'unsafe-inline'; style-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'"
}

R = TypeVar("R", bound=GenerationRequest)


def create_app(model: ServedModel, scheduler: Scheduler, key: str | None, origins: Sequence[str]) -> FastAPI:
    """Return the ASGI application. key: required from clients; None: none. origins: of other pages in browsers."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        scheduler.start(asyncio.get_running_loop())
        yield
        await run_in_threadpool(scheduler.close)

    # The documentation pages of FastAPI would load scripts from another server.
    app = FastAPI(title="Fira", lifespan=lifespan, docs_url=None, redoc_url=None, responses=ERROR_RESPONSES)
    add_error_handlers(app)
    app.add_middleware(LimitBody, limit=BODY_BYTES)
    if key:
        app.add_middleware(RequireKey, key=key)
    if origins:
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])
    app.add_middleware(LogRequests)
    created = int(time.time())

    async def respond(request: Request, body: R, make: Callable[[R], list[Choice]], chat: bool) -> Response:
        choices = await run_in_threadpool(make, body)
        answer = Answer(model.name, choices, chat, body.usage_in_stream)
        scheduler.submit(choices)
        if body.stream:
            return EventStream(answer)
        return await whole_answer(request, answer)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        return await respond(request, body, model.chat_choices, chat=True)

    @app.post("/v1/completions")
    async def completions(request: Request, body: CompletionRequest) -> Response:
        return await respond(request, body, model.completion_choices, chat=False)

    def description() -> dict[str, Any]:
        standard = {"id": model.name, "object": "model", "created": created, "owned_by": "fira"}
        return standard | {"max_model_len": model.context}  # the name of this field in vLLM

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [description()]}

    @app.get("/v1/models/{name:path}")
    async def model_by_name(name: str) -> dict[str, Any]:
        model.check_name(name)
        return description()

    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health() -> JSONResponse:
        running, waiting = scheduler.load()
        alive = scheduler.is_alive()
        status = {"status": "ok" if alive else "failed", "running": running, "waiting": waiting}
        return JSONResponse(status, 200 if alive else 503)

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers=PAGE_HEADERS)

    return app


class EventStream(StreamingResponse):
    """A streamed answer, which is cancelled when the client disconnects."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.stream(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.cancel()


async def whole_answer(request: Request, answer: Answer) -> Response:
    """Wait for the answer, or cancel it when the client disconnects."""
    body, gone = asyncio.ensure_future(answer.whole()), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({body, gone}, return_when=asyncio.FIRST_COMPLETED)
        return JSONResponse(body.result()) if body.done() else Response(status_code=499)
    finally:
        answer.cancel()
        for task in (body, gone):
            task.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
