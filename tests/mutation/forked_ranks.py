"""A replacement of `tests.launch.run_function` whose ranks are forks of this process over gloo.

They have torch imported already and need no mpirun, so that a test on four ranks takes seconds instead of a minute on a
loaded machine. Mutants are of modules above the backend, which behave the same over gloo.
"""

import json
import os
import signal
import tempfile
import time
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist


def run_function(n: int, module: str, function: str, timeout: float = 60, **kwargs: Any) -> list[Any]:
    """Call ``module.function(**kwargs)`` on ``n`` ranks. If one fails, the others are ended, as under mpirun.

    timeout: ignored, because the run of the tests has a time limit.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        running = {os.fork() or _run_rank(rank, n, module, function, kwargs, folder): rank for rank in range(n)}
        failed = False
        while running and not failed:
            time.sleep(0.01)
            for pid in list(running):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    del running[pid]
                    failed |= status != 0
        for pid in running:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        logs = "\n".join(path.read_text() for path in sorted(folder.glob("*.log")))
        assert not failed, f"{module}.{function} on {n} ranks: {logs}"
        return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(n)]


def _run_rank(rank: int, n: int, module: str, function: str, kwargs: dict[str, Any], folder: Path) -> NoReturn:
    """Call the function as one rank, write its result as JSON, and end the process."""
    log = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(log, stream)
    try:
        dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), n), rank=rank, world_size=n)
        result = getattr(import_module(module), function)(**json.loads(json.dumps(kwargs)))
        (folder / f"{rank}.json").write_text(json.dumps(result))
        dist.barrier()  # a rank that ends earlier closes connections that others use
    except BaseException:
        os.write(log, traceback.format_exc().encode())
        os._exit(1)
    os._exit(0)
