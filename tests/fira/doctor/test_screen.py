"""The screen: this machine, the conclusion, and machines on which a check fails."""

import pytest

from fira.doctor import gpus, host, launcher, screen
from fira.doctor.finding import Finding, Level
from fira.doctor.limited_process import Outcome
from pipeline.mpi import World

SUBJECTS = ["packages", "MPI library", "launcher", "mpirun and MPI", "ranks", "cores", "torch", "NVIDIA driver"]
LAST = ["precision", "memory", "shared memory", "run folders", "data cache"]
OK, PROBLEM, FATAL = (Finding("x", "y", level, "z") for level in (Level.OK, Level.PROBLEM, Level.FATAL))


def shown(world: World | None = None) -> tuple[list[Finding], str]:
    lines: list[str] = []
    return screen.show(world, lines.append), "\n".join(lines)


def test_every_subject_of_this_machine_is_shown_on_one_screen():
    findings, text = shown()
    subjects = [finding.subject for finding in findings]
    assert subjects[: len(SUBJECTS)] == SUBJECTS
    assert subjects[-len(LAST) :] == LAST
    assert len(text.splitlines()) < 50
    assert text.splitlines()[0].startswith("Fira ")


def test_a_check_that_fails_does_not_end_the_others(monkeypatch):
    def broken(*arguments: object) -> None:
        raise OSError("nothing here")

    for module, name in ((launcher, "find_library"), (host, "read_cores"), (gpus, "find_devices")):
        monkeypatch.setattr(module, name, broken)
    findings, text = shown()
    assert text.count("this check failed: OSError: nothing here") == 3
    assert {finding.subject for finding in findings} > {"MPI", "cores", "torch", "ranks", "memory", "data cache"}


def test_without_any_launcher(monkeypatch):
    monkeypatch.setattr(launcher, "find_launchers", list)
    monkeypatch.setattr(screen.shutil, "which", lambda name: None)
    assert [finding.subject for finding in screen.mpi_findings(None)] == ["MPI library", "launcher"]
    monkeypatch.setattr(screen.shutil, "which", lambda name: "/bin/srun" if name == "srun" else None)
    assert screen.mpi_findings(None)[-1] == Finding("launcher", "srun; no mpirun")


def test_without_mpi_library(monkeypatch):
    monkeypatch.setattr(launcher, "find_library", lambda: (None, Outcome(1, "cannot load MPI library", 1.0, 0)))
    findings = screen.mpi_findings(None)
    assert [finding.subject for finding in findings] == ["MPI library", "launcher"]
    assert not screen.is_usable(findings)


def test_ranks_of_mpirun_are_not_started_again(monkeypatch):
    monkeypatch.setattr(launcher, "start_ranks", None)
    world = World(rank=0, size=4, local_rank=0, local_size=2)
    assert [finding.subject for finding in screen.mpi_findings(world)] == ["MPI library"]
    assert screen.ranks_finding(world).text == "4, of which 2 on this machine"


@pytest.mark.parametrize(
    ("findings", "usable", "conclusion"),
    [
        ([OK], True, "fira can train on this machine"),
        ([OK, PROBLEM], True, "the lines marked PROBLEM say what does not work"),
        ([FATAL, PROBLEM], False, "fira cannot train on this machine; resolve the lines marked FATAL"),
    ],
)
def test_conclusion(findings, usable, conclusion):
    assert screen.is_usable(findings) is usable
    assert conclusion in screen.conclusion(findings)
