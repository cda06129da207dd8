"""Ranks of torchrun, deepspeed and accelerate: MPI connects them through torch's store."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.mpi.launchers import without_launcher
from tests.launch import inherited, is_mpich, members

pytestmark = [pytest.mark.timeout(250), pytest.mark.skipif(not is_mpich(), reason="other MPI libraries have no PMI 1")]

PROGRAM = """
import os, signal, sys, time
import torch, torch.distributed as dist
import pipeline
world = pipeline.init()
total = torch.tensor([world.rank + 1.0])
dist.all_reduce(total)
print("rank", world.rank, "of", world.size, "local", world.local_rank, "of", world.local_size, total.item(), flush=True)
if sys.argv[1:] == ["raise"] and world.rank == 1:
    raise ValueError("bad value")
if sys.argv[1:] == ["kill"] and world.rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[1:]:
    time.sleep(60)
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_ranks(folder: Path, *arguments: str) -> list[subprocess.Popen[str]]:
    """Start two ranks as the command deepspeed does."""
    (folder / "program.py").write_text(PROGRAM)
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(folder / "program.py"), *arguments]
    return [
        subprocess.Popen(
            command,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=without_launcher(inherited()) | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            start_new_session=True,
        )
        for rank in range(2)
    ]


def end_all(ranks: list[subprocess.Popen[str]]) -> None:
    for rank in ranks:
        for pid in members(rank.pid):
            os.kill(pid, signal.SIGKILL)
        rank.communicate()


def test_ranks_find_each_other(tmp_path: Path) -> None:
    ranks = start_ranks(tmp_path)
    try:
        outputs = [rank.communicate(timeout=100)[0] for rank in ranks]
    finally:
        end_all(ranks)
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    assert outputs == [f"rank {n} of 2 local {n} of 2 3.0\n" for n in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize(("end", "message"), [("raise", "ValueError: bad value"), ("kill", "rank 1 (process ")])
def test_the_failure_of_a_rank_ends_the_others(tmp_path: Path, end: str, message: str) -> None:
    """No launcher ends the other rank here, as if it were on another machine."""
    ranks = start_ranks(tmp_path, end)
    try:
        outputs = [rank.communicate(timeout=100)[0] for rank in ranks]
    finally:
        end_all(ranks)
    assert all(rank.returncode != 0 for rank in ranks), outputs
    assert message in "".join(outputs)


def test_a_rank_whose_manager_was_killed_ends_when_it_aborts() -> None:
    program = "import os\nfrom pipeline.mpi import process_manager\n"
    program += "read, process_manager._connection = os.pipe()\nos.close(read)\nprocess_manager.abort(3)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == 3
