"""Print one line of JSON about the MPI library and this process's rank: ``python -m pipeline.mpi.probe``.

A diagnosis starts this program, because a library that cannot start ends the process. It imports no torch.
"""

import json
import re
import sys
from pathlib import Path

from pipeline.mpi.world import prefer_installed_library


def main() -> None:
    import mpi4py

    prefer_installed_library()
    from mpi4py import MPI

    maps = Path("/proc/self/maps")
    loaded = re.findall(r"/\S*libmpi[\w-]*\.so\S*", maps.read_text()) if maps.exists() else []
    facts = {
        "library": MPI.Get_library_version(),
        "file": loaded[0] if loaded else "",
        "mpi4py": mpi4py.__version__,
        "rank": MPI.COMM_WORLD.Get_rank(),
        "size": MPI.COMM_WORLD.Get_size(),
    }
    sys.stdout.write(f"{json.dumps(facts)}\n")  # in one piece, unlike print, because several ranks write


if __name__ == "__main__":
    main()
