"""Run a script or a function of a test module on several ranks. No process survives the call."""

import gc
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
    """Run ``mpirun -np n python script args`` and return its exit status, stdout and stderr.

    Args:
        n: number of ranks.
        script: path of the program.
        *args: arguments of the program.
        timeout: limit in seconds.
        env: environment variables in addition to those of this process.
        within: command that is prepended to ``mpirun``, for example ``ip netns exec NAME``.

    Raises:
        subprocess.TimeoutExpired: after ``timeout`` seconds, when every process of the job has been killed.
    """
    command = [*within, mpirun(), "-np", n, sys.executable, script, *args]
    environment = inherited() | {"PIPELINE_MPI_HANG_DIR": tempfile.gettempdir()} | (env or {})
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        # Files instead of pipes: a process that outlives mpirun cannot block the reader.
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
    """Call ``module.function(**kwargs)`` on ``n`` ranks after ``pipeline.init()``. Arguments and results are JSON.

    Returns:
        The results by rank.

    Raises:
        AssertionError: if a rank fails. The message contains the output of the job.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = run_ranks(n, __file__, module, function, json.dumps(kwargs), folder, timeout=timeout, env=env)
        assert result.returncode == 0, f"{module}.{function} on {n} ranks: {result.stdout}\n{result.stderr}"
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(n)]


def inherited() -> dict[str, str]:
    """Return this process's environment with the checkout on PYTHONPATH.

    ``os.environ.copy()`` may fail in a thread, because pytest sets and deletes a variable for every test.
    """
    variables = {name: os.environ.get(name) for name in list(os.environ)}
    return {name: value for name, value in variables.items() if value is not None} | {"PYTHONPATH": str(ROOT)}


def mpirun() -> str:
    """Return the ``mpirun`` of a wheel in this environment, which may not be on the PATH, or the system's."""
    installed = Path(sys.executable).with_name("mpirun")
    return str(installed) if installed.exists() else "mpirun"


def is_mpich() -> bool:
    """Return whether ``mpirun`` is that of MPICH."""
    return "HYDRA" in subprocess.run([mpirun(), "--version"], capture_output=True, text=True, check=False).stdout


def members(session: int) -> list[int]:
    """Return the running processes of a session. mpirun puts its children in separate process groups."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, its_session = stat.read_text().rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):
            continue  # the process has ended in the meantime
        if int(its_session) == session and state not in "XZ":
            found.append(int(stat.parent.name))
    return found


def _main(module: str, function: str, kwargs: str, folder: str) -> None:
    gc.disable()  # searching the imported modules for garbage would take a tenth of the start
    import pipeline

    world = pipeline.init()
    called = getattr(import_module(module), function)
    gc.enable()
    result = called(**json.loads(kwargs))
    Path(folder, f"{world.rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    _main(*sys.argv[1:])
