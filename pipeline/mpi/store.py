"""Key-value store over MPI, by which other backends (NCCL, gloo) connect without a port or a host name."""

import atexit
import json
import threading
import time
from datetime import timedelta

from mpi4py import MPI
from torch.distributed import Store

REQUEST, REPLY = 0, 1
STORE_POLL_S = 0.005


class MPIStore(Store):
    """Store whose keys and values are on rank 0, where a thread answers requests. MPI groups do not need it.

    Args:
        comm: a communicator of all ranks.
        timeout_s: limit in seconds for an answer and for ``wait``.
    """

    def __init__(self, comm: MPI.Intracomm, timeout_s: float) -> None:
        super().__init__()
        self._comm = comm.Dup()
        self._limit = timedelta(seconds=timeout_s)
        self._request_lock = threading.Lock()  # one request at a time; none of them blocks
        self._number = 0
        if comm.Get_rank() == 0:
            self._closing = threading.Event()
            self._server = threading.Thread(target=self._serve, name="mpi-store", daemon=True)
            self._server.start()
            atexit.register(self._close)

    def _close(self) -> None:
        """Stop the thread, because MPI must not be called after its finalization."""
        self._closing.set()
        self._server.join()

    def _serve(self) -> None:
        values: dict[str, str] = {}
        status = MPI.Status()
        while not self._closing.is_set():
            if not self._comm.Iprobe(tag=REQUEST, status=status):
                self._closing.wait(STORE_POLL_S)
                continue
            request = bytearray(status.Get_count(MPI.BYTE))
            self._comm.Recv(request, status.Get_source(), REQUEST)
            number, *call = json.loads(request)
            self._comm.Send(json.dumps([number, _answer(values, *call)]).encode(), status.Get_source(), REPLY)

    def _request(self, *call: object) -> str | int | None:
        """Send a request to rank 0 and return its answer.

        Raises:
            RuntimeError: if there is no answer within the store's timeout.
        """
        with self._request_lock:
            self._number += 1
            request = json.dumps([self._number, *call]).encode()
            self._sent = self._comm.Isend(request, 0, REQUEST), request  # kept alive until its answer arrives
            status = MPI.Status()
            deadline = time.monotonic() + self._limit.total_seconds()
            number = 0
            while number != self._number:  # late answers to earlier requests are dropped
                while not self._comm.Iprobe(0, REPLY, status):
                    if time.monotonic() > deadline:
                        raise RuntimeError(f"Timed out after {self._limit.total_seconds():g} s: no answer from rank 0")
                    time.sleep(STORE_POLL_S)
                reply = bytearray(status.Get_count(MPI.BYTE))
                self._comm.Recv(reply, 0, REPLY)
                number, answer = json.loads(reply)
            self._sent[0].Wait()
            return answer

    def set(self, key: str, value: str | bytes) -> None:
        self._request("set", key, _text(value))

    def get(self, key: str) -> bytes:
        """Wait for ``key`` and return its value."""
        self.wait([key])
        return str(self._request("get", key)).encode("latin-1")

    def add(self, key: str, value: int) -> int:
        return int(self._request("add", key, value) or 0)

    def compare_set(self, key: str, expected_value: str | bytes, desired_value: str | bytes) -> bytes:
        return str(self._request("compare_set", key, _text(expected_value), _text(desired_value))).encode("latin-1")

    def check(self, keys: list[str]) -> bool:
        return all(self._request("get", key) is not None for key in keys)

    def delete_key(self, key: str) -> bool:
        return bool(self._request("delete", key))

    def num_keys(self) -> int:
        return int(self._request("count", "") or 0)

    def set_timeout(self, timeout: timedelta) -> None:
        self._limit = timeout

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Wait until all keys are set.

        Raises:
            RuntimeError: if they are not set within ``timeout``.
        """
        limit = timeout or self._limit
        deadline = time.monotonic() + limit.total_seconds()
        while not self.check(keys):
            if time.monotonic() > deadline:
                raise RuntimeError(f"Timed out after {limit.total_seconds():g} s waiting for {keys} in the store")
            time.sleep(STORE_POLL_S)


def _answer(values: dict[str, str], call: str, key: str, *args: str) -> str | int | None:
    """Execute one request. Bytes are encoded as latin-1, counters as decimal text as in PyTorch's own stores."""
    match call:
        case "set":
            values[key] = args[0]
        case "add":
            values[key] = str(int(values.get(key, "0")) + int(args[0]))
            return int(values[key])
        case "compare_set":
            expected, desired = args
            if values.get(key, "") == expected:
                values[key] = desired
            return values.get(key, expected)
        case "delete":
            return int(values.pop(key, None) is not None)
        case "count":
            return len(values)
    return values.get(key)


def _text(value: str | bytes) -> str:
    return value if isinstance(value, str) else bytes(value).decode("latin-1")
