"""HTTP server of the page: GET / for the page, /state.json for all runs, and /run.json?run=FOLDER for one of them."""

import hashlib
import json
import math
import sys
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.parse import parse_qs, urlsplit

from fira.errors import UserError
from fira.metrics.csv_log import LOG_NAME
from fira.training.config import CONFIG_NAME
from fira.watching.followed_run import FollowedRun

PAGE = Path(__file__).with_name("watch_page.html")
# The page contains its script and its style, and connects to this server only.
POLICY = (
    "default-src 'none'; connect-src 'self'; img-src data:; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "frame-ancestors 'none'; base-uri 'none'"
)
LOOPBACK = ("127.0.0.1", "localhost")


class FollowedRuns:
    """The runs of folders that are run folders themselves or contain some, in themselves or in folders of recipes.

    Runs may be created later.

    Raises UserError if a folder does not exist.
    """

    def __init__(self, paths: list[Path]) -> None:
        for path in paths:
            if not path.is_dir():
                raise UserError(f"{path}: no such folder; give run folders, or a folder that contains some")
        self._paths = paths
        self._runs: dict[str, FollowedRun] = {}  # by folder
        self._lock = Lock()  # requests run in threads

    def overviews(self) -> list[dict[str, Any]]:
        """See `FollowedRun.overview`."""
        with self._lock:
            folders = self._folders()
            for folder in folders:
                self._runs.setdefault(str(folder), FollowedRun(folder))
            return [self._runs[str(folder)].overview() for folder in folders]

    def details(self, folder: str) -> dict[str, Any]:
        """See `FollowedRun.details`. Raises KeyError for a folder that `overviews` has not returned."""
        with self._lock:
            return self._runs[folder].details()

    def _folders(self) -> list[Path]:
        found: list[Path] = []
        for path in self._paths:
            if (path / LOG_NAME).exists() or (path / CONFIG_NAME).exists():
                found.append(path)
            else:  # a folder of runs, or of recipes
                logs = (log for pattern in (f"*/{LOG_NAME}", f"*/*/{LOG_NAME}") for log in path.glob(pattern))
                found += sorted(log.parent for log in logs)
        return list(dict.fromkeys(found))


class Server(ThreadingHTTPServer):
    """Server that reports no error if a browser closes its connection."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def _as_json(value: Any) -> Any:
    """A value that JSON can represent: numbers that are not finite become null, and other types text."""
    if isinstance(value, dict):
        return {str(key): _as_json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(entry) for entry in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | None) else str(value)


def make_server(runs: FollowedRuns, host: str, port: int) -> ThreadingHTTPServer:
    """Return a server that accepts connections; port 0 is a free one. Raises UserError if that is not possible."""
    try:
        server = Server((host, port), _handler(runs, host))
    except (OSError, UnicodeError, OverflowError) as error:
        raise UserError(f"--host {host} --port {port}: {error}; give another host or port") from None
    server.daemon_threads = True
    return server


def _handler(runs: FollowedRuns, host: str) -> type[BaseHTTPRequestHandler]:
    def state(_: dict[str, list[str]]) -> Any:
        return {"runs": runs.overviews()}

    def details(query: dict[str, list[str]]) -> Any:
        return runs.details(query["run"][0])

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            # A page of another site whose name was resolved to this machine sends its own name.
            name = (self.headers.get("Host") or "").rsplit(":", 1)[0]
            if host in LOOPBACK and name not in LOOPBACK:
                self._send(HTTPStatus.FORBIDDEN, "text/plain", b"open the page as http://127.0.0.1\n")
                return
            address = urlsplit(self.path)
            if address.path == "/":
                self._send(HTTPStatus.OK, "text/html; charset=utf-8", PAGE.read_bytes())
            elif address.path in ("/state.json", "/run.json"):
                self._send_json(state if address.path == "/state.json" else details, parse_qs(address.query))
            else:
                self._send(HTTPStatus.NOT_FOUND, "text/plain", b"not found\n")

        def _send_json(self, answer: Callable[[dict[str, list[str]]], Any], query: dict[str, list[str]]) -> None:
            try:
                document = answer(query)
            except KeyError:
                self._send(HTTPStatus.NOT_FOUND, "text/plain", b"no such run\n")
            else:
                body = json.dumps(_as_json(document), separators=(",", ":")).encode(errors="replace")
                self._send(HTTPStatus.OK, "application/json", body)

        def _send(self, status: HTTPStatus, kind: str, body: bytes) -> None:
            """Send a body, or only that it has not changed since the browser's last request."""
            tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
            is_known = status == HTTPStatus.OK and self.headers.get("If-None-Match") == tag
            self.send_response(HTTPStatus.NOT_MODIFIED if is_known else status)
            self.send_header("ETag", tag)
            self.send_header("Cache-Control", "no-cache")
            self.send_header("Content-Security-Policy", POLICY)
            if not is_known:
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if not is_known:
                self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Print nothing for a request."""

    return Handler
