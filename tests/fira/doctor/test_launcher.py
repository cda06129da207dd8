"""MPI library and launcher: real ones, and imitations of what goes wrong."""

import json
import os
import stat
from pathlib import Path

import pytest

from fira.doctor import launcher
from fira.doctor.finding import Level
from fira.doctor.launcher import (
    Launcher,
    Library,
    find_launchers,
    find_library,
    foreign_launcher,
    implementation,
    launcher_finding,
    library_finding,
    match_finding,
    start_ranks,
)
from fira.doctor.limited_process import Outcome
from tests.launch import mpirun

HYDRA = "HYDRA build details:\n    Version:       5.0.2\n    CC:   cc"
PRTE = "mpirun (Open MPI) 5.0.11\n\nReport bugs to https://www.open-mpi.org/community/help/"
LIBRARY = Library("MPICH Version:      5.0.2\nMPICH ABI: 18:2:6", "/venv/lib/libmpi.so.12", "4.1.2")
OMPI = Library("Open MPI v5.0.11, package: Open MPI", "/usr/lib/libmpi.so.40", "4.1.2")
MPICH_RUN, OMPI_RUN = Launcher("/venv/bin/mpirun", HYDRA), Launcher("/usr/bin/mpirun", PRTE)


def outcome(output: str, status: int | None = 0) -> Outcome:
    return Outcome(status, output, 1.0, 0)


def reports(*pairs: tuple[int, int]) -> Outcome:
    """The output of ranks that report (rank, size)."""
    return outcome("".join(json.dumps({"library": "x", "rank": rank, "size": size}) + "\n" for rank, size in pairs))


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (HYDRA, "MPICH 5.0.2"),
        (PRTE, "Open MPI 5.0.11"),
        (LIBRARY.version, "MPICH 5.0.2"),
        (OMPI.version, "Open MPI 5.0.11"),
        ("Intel(R) MPI Library for Linux* OS, Version 2021.13 Build 20240515", "Intel MPI 2021.13"),
        ("something", "an unknown MPI"),
    ],
)
def test_names_of_implementations(text, name):
    assert implementation(Launcher("mpirun", text)) == name


def test_library_and_mpirun_of_this_environment_belong_together(monkeypatch):
    monkeypatch.setenv("PATH", f"{Path(mpirun()).parent}:{os.environ['PATH']}")
    library, result = find_library()
    assert library is not None
    assert library_finding(library, result).level is Level.OK
    launchers = find_launchers()
    finding = match_finding(library, launchers, start_ranks(launchers[0]))
    assert (finding.level, finding.text) == (Level.OK, "belong together: 2 ranks know each other")


def test_a_launcher_that_starts_independent_processes_is_found(tmp_path, monkeypatch):
    """A program that runs its command twice, without telling the processes about each other."""
    program = tmp_path / "mpirun"
    program.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo "mpirun (Open MPI) 5.0.11" && exit\nshift 2\n"$@"\n"$@"\n'
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{Path(mpirun()).parent}:{os.environ['PATH']}")
    library, _ = find_library()
    launchers = find_launchers()
    assert library is not None
    assert launchers[0].path == str(program)
    finding = match_finding(library, launchers, start_ranks(launchers[0]))
    assert finding.level is Level.PROBLEM
    assert finding.text == "do not belong together: each of 2 processes is rank 0 of 1"
    assert f"; use {Path(mpirun()).resolve()}: export PATH=" in finding.remedy


def test_reports_of_two_ranks_in_one_line_are_read():
    joined = outcome(reports((1, 2), (0, 2)).output.replace("\n", "") + "\n\n")
    assert match_finding(LIBRARY, [MPICH_RUN], joined).level is Level.OK


def test_every_process_is_rank_0_of_1():
    finding = match_finding(LIBRARY, [OMPI_RUN], reports((0, 1), (0, 1)))
    assert finding.text == "do not belong together: each of 2 processes is rank 0 of 1"
    assert finding.remedy == "mpi4py loads MPICH 5.0.2; pip install mpich, and use its mpirun"


def test_the_fitting_mpirun_is_named():
    finding = match_finding(OMPI, [MPICH_RUN, OMPI_RUN], reports((0, 1), (0, 1)))
    assert finding.remedy == 'mpi4py loads Open MPI 5.0.11; use /usr/bin/mpirun: export PATH="/usr/bin:$PATH"'


@pytest.mark.parametrize(
    ("library", "started", "text", "remedy"),
    [
        (LIBRARY, outcome("Abort: unsupported PMI version PMIx.", 16), "Open MPI 5.0.11, mpi4py loads MPICH", "mpich"),
        (OMPI, outcome("There are not enough slots available", 1), "refuses to start 2 ranks", "--oversubscribe"),
        (OMPI, outcome("has detected an attempt to run as root.", 1), "refuses", "OMPI_ALLOW_RUN_AS_ROOT=1"),
        (OMPI, outcome("", None), "have not started within 30 s", "hostname -i"),
        (OMPI, outcome("first\nthe reason\n", 7), "ended with status 7: the reason", "/usr/bin/mpirun -np 2 hostname"),
        (OMPI, reports((0, 2), (0, 2)), "ended with status 0", "/usr/bin/mpirun -np 2 hostname"),
    ],
)
def test_a_launcher_that_does_not_start_ranks(library, started, text, remedy):
    finding = match_finding(library, [OMPI_RUN], started)
    assert finding.level is Level.PROBLEM
    assert text in finding.text
    assert remedy in finding.remedy


def test_launcher_on_the_path_in_the_environment_only_or_nowhere():
    assert launcher_finding([MPICH_RUN], "/venv/bin/mpirun").text == "MPICH 5.0.2, /venv/bin/mpirun"
    finding = launcher_finding([MPICH_RUN], None)
    assert (finding.text, finding.level) == ("/venv/bin/mpirun is not on the PATH", Level.PROBLEM)
    assert 'export PATH="/venv/bin:$PATH"' in finding.remedy
    finding = launcher_finding([], None)
    assert (finding.text, finding.level) == ("no mpirun: only one rank can be started", Level.PROBLEM)
    assert finding.remedy.startswith("pip install mpich")


def test_a_missing_library_makes_training_impossible():
    finding = library_finding(None, outcome("RuntimeError: cannot load MPI library\n", 1))
    assert (finding.level, finding.text) == (Level.FATAL, "cannot be loaded: RuntimeError: cannot load MPI library")
    finding = library_finding(None, outcome("ModuleNotFoundError: No module named 'mpi4py'", 1))
    assert (finding.level, finding.remedy) == (Level.FATAL, "pip install mpi4py mpich")


def test_ranks_of_open_mpi_with_another_library(monkeypatch):
    monkeypatch.setattr(launcher, "find_launchers", lambda: [OMPI_RUN])
    assert foreign_launcher(LIBRARY) is None
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    message = foreign_launcher(LIBRARY)
    assert message is not None
    assert message.startswith("Open MPI's mpirun started this program, but mpi4py loads MPICH 5.0.2")
    assert foreign_launcher(OMPI) is None
