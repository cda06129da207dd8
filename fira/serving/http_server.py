"""The HTTP server around the application: its socket, and how it ends."""

import signal
import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI

from fira.errors import UserError
from fira.files import one_line
from fira.serving.scheduler import Scheduler

GRACE = 5.0  # seconds for the last errors to be sent, after the time for answers is over


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that accepts connections; port 0 is a free one. Raises UserError if that is not possible."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address, family=family, backlog=2048)
    except (OSError, UnicodeError) as error:
        raise UserError(f"--host {host} --port {port}: {one_line(error)}; give another host or port") from None


def url(listening: socket.socket) -> str:
    """The address of the server for programs on this machine."""
    host, port = listening.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_loopback(listening: socket.socket) -> bool:
    """Whether only programs on this machine can connect."""
    host = listening.getsockname()[0]
    return host.startswith("127.") or host == "::1"


class _Server(uvicorn.Server):
    """Ends the scheduler's requests within `seconds` after the first signal."""

    def __init__(self, config: uvicorn.Config, scheduler: Scheduler, seconds: float) -> None:
        super().__init__(config)
        self._scheduler, self._seconds = scheduler, seconds

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._scheduler.drain(self._seconds)
        super().handle_exit(sig, frame)


def run_server(app: FastAPI, scheduler: Scheduler, listening: socket.socket, seconds: float) -> None:
    """Serve until SIGTERM or SIGINT, then finish running answers within a number of seconds; a second SIGINT ends now.

    Call it in the main thread.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)  # uvicorn repeats the signal when it has ended
    config = uvicorn.Config(
        app, log_config=None, log_level="error", access_log=False, timeout_graceful_shutdown=int(seconds + GRACE)
    )
    _Server(config, scheduler, seconds).run(sockets=[listening])
    scheduler.close()  # after a second SIGINT, the application has not done it
