"""Errors in the form of OpenAI's API: `{"error": {"message", "type", "param", "code"}}`."""

import re
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from fira.errors import UserError
from fira.serving.scheduler import SHUTTING_DOWN, QueueFullError, ShuttingDownError

_ERROR = {"type": "object", "properties": {name: {} for name in ("message", "type", "param", "code")}}
_BODY = {"type": "object", "properties": {"error": _ERROR}, "required": ["error"]}
# For /openapi.json. FastAPI would declare status 422 for invalid requests, which are answered with 400.
ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"description": description, "content": {"application/json": {"schema": _BODY}}}
    for status, description in (("4XX", "The request is not valid."), ("5XX", "The server cannot answer."))
}


class APIError(Exception):
    """An error that the client receives. param: field of the request. code: identifier of the error for programs."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, dict[str, str | None]]:
        kind = "rate_limit_error" if self.status == 429 else "invalid_request_error"
        kind = "server_error" if self.status >= 500 else kind
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        # The openai client waits for this many seconds before it repeats a request.
        headers = {"Retry-After": "1"} if self.status in (429, 503) else {}
        return JSONResponse(self.body(), self.status, headers)


def as_api_error(error: Exception) -> APIError:
    """The form in which a client receives an exception."""
    match error:
        case APIError():
            return error
        case UserError():
            return APIError(400, str(error))
        case QueueFullError():
            message = "too many requests are waiting; repeat the request later"
            return APIError(429, message, code="rate_limit_exceeded")
        case ShuttingDownError():
            return APIError(503, SHUTTING_DOWN, code="shutting_down")
        case RequestValidationError():
            return _validation_error(error.errors()[0])
        case HTTPException():
            return APIError(error.status_code, str(error.detail))
        case _:
            return APIError(500, "the server failed; see its log")


def _validation_error(found: dict[str, Any]) -> APIError:
    """The first error that pydantic has found in the body of a request."""
    if found["loc"] == ("body",) or found["type"] == "json_invalid":
        reason = found.get("ctx", {}).get("error", "no object")
        message = f"the body is not a JSON object ({reason}); send one with Content-Type: application/json"
        return APIError(400, message, code="invalid_json")
    parts = [str(part) for part in found["loc"][1:]]
    names = [part for part in parts if not re.search(r"[\[(]", part)]  # the others are pydantic's names of types
    field = ".".join(names)
    message = found["msg"]
    if names != parts and found["type"].endswith("_type"):
        message = "the value has none of the types that are allowed here"
    return APIError(400, f"{field}: {message}", field, found["type"])


async def _respond(_: Request, error: Exception) -> JSONResponse:
    return as_api_error(error).response()


def add_error_handlers(app: FastAPI) -> None:
    """Answer every exception in the form of the API."""
    kinds = (APIError, UserError, QueueFullError, ShuttingDownError, RequestValidationError, HTTPException, Exception)
    for kind in kinds:
        app.add_exception_handler(kind, _respond)
