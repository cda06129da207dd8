"""Lock of a run folder: only one job at a time writes to it.

The lock is an `flock` of the file `.lock` in the folder, which also names its holder. The kernel releases it when the
process ends for any reason, SIGKILL included. On NFS, Linux passes it to the server, so that it holds between machines.
"""

import logging
import os
import socket
from contextlib import suppress
from io import FileIO
from pathlib import Path

from fira.errors import UserError
from fira.files import is_at, lock

LOCK_NAME = ".lock"

logger = logging.getLogger(__name__)


class RunLock:
    """Holds the lock of a folder, which is created if necessary, until `release`.

    Raises UserError if another process holds the lock, or if the folder is not writable.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.acquire()

    def acquire(self) -> None:
        """Acquire the lock. Also called to acquire it again after the file or the folder was removed."""
        self._file = self._locked_file()
        with suppress(OSError):  # a full disk; the name of the holder is informative
            self._file.truncate(0)
            self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())

    def _locked_file(self) -> FileIO:
        path = self.folder / LOCK_NAME
        while True:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                file = path.open("ab+", buffering=0)  # nothing is left to write when it is closed
            except OSError as error:
                raise UserError(f"--out {self.folder}: {error.strerror}; choose a writable folder") from None
            try:
                lock(file)
            except (BlockingIOError, PermissionError):
                with file:
                    file.seek(0)
                    holder = " ".join(file.read(300).decode(errors="replace").split()) or "another process"
                raise UserError(
                    f"{self.folder} is in use by {holder}; wait until it ends, or choose another folder as --out"
                ) from None
            except OSError as error:
                logger.warning("%s: no lock is possible (%s); let only one job write there", path, error.strerror)
                return file
            if is_at(file, path):
                return file
            file.close()  # its last holder removed it between the two calls

    def is_held(self) -> bool:
        """Return whether the locked file is still the one in the folder."""
        return is_at(self._file, self.folder / LOCK_NAME)

    def release(self) -> None:
        """Release the lock, and remove the folder if nothing was written to it."""
        with suppress(OSError):
            if self.is_held() and [path.name for path in self.folder.iterdir()] == [LOCK_NAME]:
                (self.folder / LOCK_NAME).unlink()
                self.folder.rmdir()
        self._file.close()
