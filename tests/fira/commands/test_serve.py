"""`fira serve` as a process: its output, its end, and one-line errors."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from fira import load_model
from fira.commands import serve
from fira.errors import UserError
from tests.fira.small_model import CONFIG
from tests.launch import ROOT, inherited


@contextmanager
def server(*arguments: object) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """A server on a free port: its process, its address, and what it has printed."""
    command = [sys.executable, "-u", "scripts/serve.py", "--port", "0", *map(str, arguments)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=inherited(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        lines = []
        while not lines or "next: " not in lines[-1]:
            lines.append(process.stdout.readline())
            assert lines[-1], lines
        yield process, re.search(r"http://127.0.0.1:\d+", "".join(lines))[0], "".join(lines)
    finally:
        process.kill()
        process.wait(10)
        process.stdout.close()


@pytest.mark.slow
def test_sigterm_finishes_the_running_stream(run_folder: Path) -> None:
    with server("--checkpoint", run_folder, "--rows", 2, "--quantize", "int8") as (process, address, printed):
        assert "int8: weights of" in printed
        assert f"({load_model(run_folder).num_parameters():,} parameters)" in printed
        assert "2 texts at a time, 128 waiting, 12 tokens per text" in printed
        (command,) = re.findall(r"next: (curl .*)", printed)
        reply = json.loads(subprocess.check_output(["bash", "-c", f"{command} -s"], timeout=30))
        assert reply["usage"]["total_tokens"] == CONFIG.seq_len + 1
        body = {"prompt": "d", "max_tokens": 11, "stream": True, "temperature": 0}
        with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=30) as stream:
            lines = stream.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert process.wait(20) == 0
        assert process.stdout.read() == "the server has ended\n"
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{address}/health")


@pytest.mark.slow
def test_sigint_ends_an_idle_server_and_the_key_can_be_a_variable(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FIRA_API_KEY", "secret")
    with server("--checkpoint", run_folder, "--verbose") as (process, address, printed):
        assert "secret" not in printed
        assert "$FIRA_API_KEY" in printed
        assert httpx.get(f"{address}/v1/models").status_code == 401
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        assert time.monotonic() - started < 10
        assert "GET /v1/models 401" in process.stdout.read()


def test_a_port_in_use_is_a_one_line_error(run_folder: Path) -> None:
    from fira.serving.http_server import listen

    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"--port {port}: .*in use.*; give another") as error:
            serve.main(["--checkpoint", str(run_folder), "--port", str(port)])
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["", " ", "clé"])
def test_an_unusable_key_is_a_one_line_error(run_folder: Path, key: str) -> None:
    with pytest.raises(UserError, match="--api-key, or FIRA_API_KEY: the key is empty or has"):
        serve.main(["--checkpoint", str(run_folder), "--api-key", key])


@pytest.mark.parametrize("name", ["fastapi", "uvicorn"])
def test_a_missing_package_is_a_one_line_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=rf"serve needs the package {name}; pip install -e '.\[serve\]'"):
        serve.main(["--checkpoint", "nowhere"])


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("runs/a", "a"),
        ("runs/a/checkpoints", "a"),
        ("runs/a/checkpoints/step-000010", "a"),
        ("exported", "exported"),
    ],
)
def test_name_of_the_model(folder: str, name: str) -> None:
    assert serve.name_of(folder) == name
    assert serve.name_of(os.path.join(folder, "")) == name
