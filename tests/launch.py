"""Run a script, or a function of a test module, on several ranks; nothing survives the call."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def run_ranks(
    n: int,
    script: str | Path,
    *args: object,
    timeout: float = 60,
    env: dict[str, str] | None = None,
    within: Sequence[str] = (),
) -> subprocess.CompletedProcess[str]:
    """Run ``mpirun -np n python script args`` with one thread per rank and return status, stdout and stderr.

    Args:
        within: a command that runs mpirun, somewhere else or in another way.

    Raises:
        subprocess.TimeoutExpired: after ``timeout`` seconds; every process of the job is killed first.
    """
    command = [*within, mpirun(), "-np", n, sys.executable, script, *args]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PIPELINE_MPI_HANG_DIR": tempfile.gettempdir()} | (env or {})
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        # Files, not pipes: a process that outlives mpirun cannot hold up the reader.
        process = subprocess.Popen(
            [str(part) for part in command], stdout=out, stderr=err, env=environment, cwd=ROOT, start_new_session=True
        )
        try:
            status = process.wait(timeout)
        finally:
            for pid in members(process.pid):
                os.kill(pid, signal.SIGKILL)
            process.wait()
            texts = [(file.seek(0), file.read())[1] for file in (out, err)]
            if process.returncode == -signal.SIGKILL:
                print(*texts, sep="\n", file=sys.stderr)  # pytest shows it with the failure
        return subprocess.CompletedProcess(command, status, *texts)


def run_function(
    n: int, module: str, function: str, timeout: float = 60, env: dict[str, str] | None = None, **kwargs: Any
) -> list[Any]:
    """Call ``module.function(**kwargs)`` on ``n`` ranks after ``pipeline.init()``; arguments and results are JSON.

    Returns:
        Each rank's result, by rank.

    Raises:
        AssertionError: a rank failed; the message is what the job printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = run_ranks(n, __file__, module, function, json.dumps(kwargs), folder, timeout=timeout, env=env)
        assert result.returncode == 0, f"{module}.{function} on {n} ranks: {result.stdout}\n{result.stderr}"
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(n)]


def mpirun() -> str:
    """The wheel's mpirun, beside this Python, which not every test runner has on its PATH; else the system's."""
    beside = Path(sys.executable).with_name("mpirun")
    return str(beside) if beside.exists() else "mpirun"


def members(session: int) -> list[int]:
    """The processes of a session that live: mpirun gives its children process groups of their own."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, its_session = stat.read_text().rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended meanwhile
        if int(its_session) == session and state not in "XZ":
            found.append(int(stat.parent.name))
    return found


def _main(module: str, function: str, kwargs: str, folder: str) -> None:
    import pipeline

    world = pipeline.init()
    result = getattr(import_module(module), function)(**json.loads(kwargs))
    Path(folder, f"{world.rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    _main(*sys.argv[1:])
