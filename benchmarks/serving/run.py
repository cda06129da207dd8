"""Throughput of the server for 32 clients at the same time and for one client at a time, on the tiny presets.

    python -m benchmarks.serving.run [FAMILY …]

Both sides take turns; greedy, in fp32 on the CPU. The answers to many clients are compared with those to one client,
which are single runs. Writes results.csv.
"""

import asyncio
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import torch

from benchmarks.measure import environment, merge, ratio
from fira.data.tokenizer import train_tokenizer
from fira.models.registry import PRESETS, build
from tests.fira.small_model import perturbed, save

HERE = Path(__file__).parent
FAMILIES = ("fira", "rish", "mooshak", "blues", "microrwkv")
CLIENTS, ALONE, ROUNDS = 32, 4, 5  # ALONE: requests of the one client in a round
PROMPT, NEW = 24, 32
Prompts = list[list[int]]


@contextmanager
def server(checkpoint: Path, log: Path) -> Iterator[str]:
    """The address of a server in a process of its own."""
    command = [sys.executable, "-u", "scripts/serve.py", "--checkpoint", str(checkpoint), "--port", "0"]
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, env=os.environ | {"PYTHONPATH": str(Path.cwd())})
    try:
        while "next: " not in log.read_text():
            if process.poll() is not None:
                raise SystemExit(f"the server ended with status {process.returncode}")
            time.sleep(0.1)
        yield re.findall(r"http://127.0.0.1:\d+", log.read_text())[0]
    finally:
        process.terminate()
        process.wait(30)


async def ask(client: httpx.AsyncClient, prompt: list[int]) -> dict[str, Any]:
    body = {"prompt": prompt, "max_tokens": NEW, "temperature": 0}
    return (await client.post("/v1/completions", json=body)).raise_for_status().json()


async def measure(address: str, prompts: Prompts, together: bool) -> tuple[float, list[str]]:
    """Tokens per second, and the answers."""
    async with httpx.AsyncClient(base_url=address, timeout=300) as client:
        started = time.perf_counter()
        if together:
            answers = await asyncio.gather(*(ask(client, prompt) for prompt in prompts))
        else:
            answers = [await ask(client, prompt) for prompt in prompts]
        seconds = time.perf_counter() - started
    tokens = sum(answer["usage"]["completion_tokens"] for answer in answers)
    return tokens / seconds, [answer["choices"][0]["text"] for answer in answers]


def compare(family: str, folder: Path) -> dict[str, object]:
    """The figures of a family."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer([Path("README.md").read_text(), Path("CONTRIBUTING.md").read_text()], 2048)
    size = tokenizer.get_vocab_size()
    model = perturbed(build(replace(PRESETS[f"{family}-tiny"], vocab_size=size)), 0.05).eval()
    save(folder / family, model, {"tokenizer.json": tokenizer.to_str().encode()})
    rng = random.Random(0)
    prompts = [[rng.randrange(5, size) for _ in range(rng.randint(1, PROMPT))] for _ in range(CLIENTS)]
    speeds: dict[bool, list[float]] = {True: [], False: []}
    equal, answered = 0, 0
    with server(folder / family, folder / "server.log") as address:
        _, singles = asyncio.run(measure(address, prompts, together=False))  # also the warm-up
        for number in range(ROUNDS):
            for together in (True, False)[:: 1 if number % 2 else -1]:
                speed, answers = asyncio.run(measure(address, prompts if together else prompts[:ALONE], together))
                speeds[together].append(speed)
                if together:
                    equal += sum(answer == single for answer, single in zip(answers, singles, strict=True))
                    answered += len(answers)
    medians = {side: sorted(values)[len(values) // 2] for side, values in speeds.items()}
    return {
        "family": family,
        "one client": medians[False],
        f"{CLIENTS} clients": medians[True],
        "ratio": ratio(speeds[True], speeds[False]),
        "equal answers": f"{equal}/{answered}",
    }


def main() -> None:
    print(environment())
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for family in sys.argv[1:] or FAMILIES:
            rows.append(compare(family, Path(folder)))
            print(rows[-1], flush=True)
    print(merge(HERE / "results.csv", rows, ["family"]).to_string(index=False))


if __name__ == "__main__":
    main()
