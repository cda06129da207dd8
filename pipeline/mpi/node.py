"""The ranks on one machine: memory that they have in common, and bells by which one wakes another.

Both only save time. Where they cannot be had, messages and short sleeps take their place: without Linux, in some
sandboxes, and on processors other than x86, which may let others see a count before the data that it counts (Python has
no memory fence).
"""

import ctypes
import mmap
import os
import platform
import secrets
import time
from array import array

from mpi4py import MPI

BELL = 64  # bytes of one bell: a semaphore of the C library, on a cache line of its own


def common_memory(comm: MPI.Comm, size: int) -> mmap.mmap | None:
    """``size`` bytes, all zero, that every rank of ``comm`` sees; or None on all of them. Every rank calls it.

    The memory has no name: rank 0 makes it, the others open it through ``/proc``. So nothing can be left behind,
    however the ranks end, and the size of ``/dev/shm`` does not matter. That process ids mean the same to all ranks
    (they need not, in containers) shows in a random number that all must find.
    """
    descriptor, address = -1, array("q", [0, -1, secrets.randbits(62)])
    if comm.Get_rank() == 0 and platform.machine() in ("x86_64", "AMD64"):
        try:
            descriptor = os.memfd_create("fira")
            os.ftruncate(descriptor, size + 8)
            os.pwrite(descriptor, address[2:].tobytes(), size)
            address[0], address[1] = os.getpid(), descriptor
        except (AttributeError, OSError):
            pass  # the others will find nothing, either
    comm.Bcast(address)
    memory = None
    try:
        opened = os.open(f"/proc/{address[0]}/fd/{address[1]}", os.O_RDWR)
        memory = mmap.mmap(opened, size + 8)
        os.close(opened)
    except (OSError, ValueError):
        pass
    found = array("b", [memory is not None and memory[size:] == address[2:].tobytes()])
    comm.Allreduce(MPI.IN_PLACE, found, MPI.MIN)
    if descriptor >= 0:
        os.close(descriptor)
    return memory if found[0] else None


class Node:
    """The ranks of ``comm`` that run on this machine. Every rank makes it."""

    def __init__(self, comm: MPI.Intracomm) -> None:
        local = comm.Split_type(MPI.COMM_TYPE_SHARED, comm.Get_rank())
        self._group = local.Get_group()
        self._place, places = local.Get_rank(), local.Get_size()
        memory = common_memory(local, places * (BELL + 8))
        self._bells = None if memory is None else _Bells(memory, places, self._place)
        local.Barrier()  # all bells are there
        local.Free()

    def memory(self, comm: MPI.Intracomm, size: int) -> mmap.mmap | None:
        """``size`` bytes that every rank of ``comm`` sees, or None on all of them. Every rank calls it."""
        return None if MPI.UNDEFINED in self._translated(comm) else common_memory(comm, size)

    def places(self, comm: MPI.Intracomm) -> list[int | None]:
        """For each rank of ``comm`` its place on this machine, by which it is woken; None: elsewhere, or here."""
        return [None if place in (MPI.UNDEFINED, self._place) else place for place in self._translated(comm)]

    def _translated(self, comm: MPI.Intracomm) -> list[int]:
        return comm.Get_group().Translate_ranks(None, self._group)

    def wake(self, places: list[int | None]) -> None:
        """Wake those that sleep: there is something new for them."""
        if self._bells is not None:
            for place in places:
                if place is not None and self._bells.asleep[place]:
                    self._bells.ring(place)

    def going_to_sleep(self) -> None:
        """From now on a ``wake`` ends the next ``sleep``; look once more for what it would tell before that."""
        if self._bells is not None:
            self._bells.asleep[self._place] = 1

    def sleep(self, seconds: float) -> None:
        """Sleep until woken, but no longer than this."""
        if self._bells is None:
            time.sleep(seconds)
        else:
            self._bells.sleep(self._place, seconds)


class _Bells:
    """A semaphore for each rank, and whether it sleeps."""

    def __init__(self, memory: mmap.mmap, places: int, own: int) -> None:
        self._library = ctypes.CDLL(None)
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self._bells = [ctypes.c_void_p(start + place * BELL) for place in range(places)]
        self.asleep = memoryview(memory)[places * BELL :][: places * 8].cast("q")
        self._library.sem_init(self._bells[own], 1, 0)

    def ring(self, place: int) -> None:
        self.asleep[place] = 0
        self._library.sem_post(self._bells[place])

    def sleep(self, place: int, seconds: float) -> None:
        until = _Time.after(seconds)
        self._library.sem_timedwait(self._bells[place], ctypes.byref(until))
        self.asleep[place] = 0


class _Time(ctypes.Structure):
    """C's ``timespec``."""

    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))

    @classmethod
    def after(cls, seconds: float) -> "_Time":
        whole, part = divmod(time.time_ns() + int(seconds * 1e9), 10**9)
        return cls(whole, part)
