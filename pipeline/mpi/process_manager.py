"""Process manager for MPI in jobs of torchrun, deepspeed and accelerate, which start ranks that MPI does not know.

    rank 0   MPI_Init ─ PMI ─ manager 0 ┐
    rank 1   MPI_Init ─ PMI ─ manager 1 ┼─ store of torch.distributed at MASTER_ADDR:MASTER_PORT
    …                                   ┘

MPICH and Intel MPI read the addresses of the other ranks from a process manager, usually that of ``mpirun``, by PMI 1,
a protocol of text lines. Here a child process of each rank answers them, and keeps the values in the store by which
torch's backends connect as well. The manager is a process, because MPI_Init holds Python's lock, and because it
outlives its rank: if one rank aborts or dies, the managers end the others, also those on other machines.

The protocol: Balaji et al. 2010, "PMI: A scalable parallel process-management interface for extreme-scale systems".
"""

import os
import select
import signal
import socket
import sys
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any, NoReturn
from uuid import uuid4

from pipeline.mpi.guardian import REPORT_S
from pipeline.mpi.launchers import Launcher

START_S = 600.0  # for all ranks to connect, as in torch
POLL_S = 0.2
EXIT_S = 1.0  # for a rank that aborts to exit by itself
LIMITS = "kvsname_max=256 keylen_max=64 vallen_max=1024"  # in characters, as in MPICH's mpirun


def start(started_by: Launcher) -> None:
    """Start this rank's process manager, and let MPI connect to it. Call this before MPI is initialized."""
    global _connection
    import torch.distributed.rendezvous  # noqa: F401 (before the fork, so that both processes share its memory)

    rank, size = os.environ[started_by.rank], os.environ[started_by.size]
    to_manager, to_rank = socket.socketpair()
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    if os.fork() == 0:
        to_manager.close()
        _manage(parent, to_rank, int(size))
    to_rank.close()
    for name in [name for name in os.environ if name.startswith(("PMI_", "PMIX_"))]:
        del os.environ[name]  # srun, for example, sets some for torchrun
    _connection = to_manager.detach()
    os.environ |= {"PMI_FD": str(_connection), "PMI_RANK": rank, "PMI_SIZE": size}


_connection = -1  # to the manager of this rank


def abort(status: int) -> None:
    """End all ranks at once, this one with an exit status, if it has a process manager."""
    if _connection >= 0:
        with suppress(OSError):  # the manager may have been killed
            os.write(_connection, f"cmd=abort exitcode={status}\n".encode())
        os._exit(status)


def _manage(parent: int, connection: socket.socket, size: int) -> NoReturn:
    """Answer the rank, the process `parent`, until it ends. Kill it if the job has ended or the store is lost."""
    os.setsid()  # signals to the job are for the rank
    manager = None
    try:
        manager = _Manager(parent, connection, size)
        manager.run()
    except (_JobEndedError, RuntimeError, OSError) as error:  # torch's store raises RuntimeError
        if not isinstance(error, _JobEndedError):
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            print(f"pipeline: lost the store of the launcher at {where}: {error}", file=sys.stderr, flush=True)
        if os.getppid() == parent:
            os.kill(parent, signal.SIGKILL)
    finally:
        with suppress(RuntimeError):
            if manager is not None:
                manager.close()
        os._exit(0)


class _JobEndedError(Exception):
    """Another rank has aborted or died."""


class _Manager:
    """Answers the requests of one rank.

    parent: the process of the rank. connection: to the rank. size: number of ranks.
    """

    def __init__(self, parent: int, connection: socket.socket, size: int) -> None:
        from torch.distributed import PrefixStore
        from torch.distributed.rendezvous import rendezvous

        self._parent, self._connection, self._size = parent, connection, size
        store, self._rank, _ = next(rendezvous("env://", timeout=timedelta(seconds=START_S)))
        self._store: Any = PrefixStore("pipeline-mpi", store)
        self._barriers = 0
        self._uses_mpi = False

    def run(self) -> None:
        """Answer requests until the rank has finalized MPI or has ended.

        Raises:
            _JobEndedError: if another rank has ended the job.
        """
        unread, alive = b"", True
        while alive:
            self._check_job()
            alive = os.getppid() == self._parent
            if select.select([self._connection], [], [], POLL_S if alive else 0)[0]:
                received = self._connection.recv(4096)
                alive = alive and received != b""
                *lines, unread = (unread + received).split(b"\n")
                for line in lines:
                    self._answer(dict(word.split("=", 1) for word in line.decode().split() if "=" in word))
                    alive = alive and not line.startswith(b"cmd=finalize")
        if self._uses_mpi:
            self._report_death()

    def _answer(self, request: dict[str, str]) -> None:
        key = f"key/{request.get('key')}"
        match request["cmd"]:
            case "init":
                self._uses_mpi = True
                self._send("response_to_init", "rc=0 pmi_version=1 pmi_subversion=1")
            case "get_maxes":
                self._send("maxes", f"rc=0 {LIMITS}")
            case "get_appnum":
                self._send("appnum", "rc=0 appnum=0")
            case "get_universe_size":
                self._send("universe_size", f"rc=0 size={self._size}")
            case "get_my_kvsname":
                self._send("my_kvsname", f"rc=0 kvsname={self._job_name()}")
            case "put":
                self._store.set(key, request["value"])
                self._send("put_result", "rc=0")
            case "get" if self._store.check([key]):
                self._send("get_result", f"rc=0 value={self._store.get(key).decode()}")
            case "get":
                self._send("get_result", "rc=-1 msg=key_not_found")
            case "barrier_in":
                self._barrier()
                self._send("barrier_out", "rc=0")
            case "finalize":
                self._uses_mpi = False
                self._send("finalize_ack", "rc=0")
            case "abort":  # the rank has reported why, expects no answer, and may wait for its end
                self._uses_mpi = False
                self._store.set("ended", "")
                deadline = time.monotonic() + EXIT_S
                while os.getppid() == self._parent and time.monotonic() < deadline:
                    time.sleep(POLL_S / 20)
                raise _JobEndedError

    def _send(self, command: str, values: str) -> None:
        self._connection.sendall(f"cmd={command} {values}\n".encode())

    def _job_name(self) -> str:
        """A name that no other job on these machines has, since MPI may name shared memory by it."""
        return bytes(self._store.compare_set("name", "", uuid4().hex)).decode()

    def _barrier(self) -> None:
        """Wait until all ranks have entered the barrier."""
        self._barriers += 1
        name = f"barrier/{self._barriers}"
        self._store.add(name, 1)
        while self._store.add(name, 0) < self._size:
            self._check_job()
            time.sleep(POLL_S / 20)

    def _check_job(self) -> None:
        if self._store.check(["ended"]):
            raise _JobEndedError

    def _report_death(self) -> None:
        """End the job, because the rank has died, when the other ranks have had the time to report it."""
        deadline = time.monotonic() + REPORT_S
        while time.monotonic() < deadline and not self._store.check(["ended"]):
            time.sleep(POLL_S)
        self._store.set("ended", "")

    def close(self) -> None:
        """Wait until all managers have read their last values, because that of rank 0 may hold the store."""
        self._store.add("closed", 1)
        deadline = time.monotonic() + REPORT_S
        while self._rank == 0 and self._store.add("closed", 0) < self._size and time.monotonic() < deadline:
            time.sleep(POLL_S / 4)
