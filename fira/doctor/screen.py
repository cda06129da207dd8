"""The screen of `fira doctor`: what this machine can do, one line per subject."""

import os
import platform
import shutil
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from fira.doctor import gpus, host, launcher
from fira.doctor.device_probe import DeviceFacts
from fira.doctor.finding import Finding, Level, ShowLine, examine
from fira.host_memory import available_memory
from pipeline.mpi import World

HOPELESS = "fira cannot train on this machine; resolve the lines marked FATAL"
USABLE = "fira can train on this machine"
LIMITED = "fira can train on this machine; the lines marked PROBLEM say what does not work"
SHARED_MEMORY = Path("/dev/shm")  # on Linux only


def show(world: World | None, show_line: ShowLine = print) -> list[Finding]:
    """Examine the machine and print each finding as soon as it is known. world: None if not started by mpirun."""
    show_line(f"Fira {_versions()}\n")
    findings = []
    for finding in all_findings(world):
        show_line(str(finding))
        findings.append(finding)
    show_line(f"\n{conclusion(findings)}")
    return findings


def conclusion(findings: list[Finding]) -> str:
    levels = {finding.level for finding in findings}
    return HOPELESS if Level.FATAL in levels else LIMITED if Level.PROBLEM in levels else USABLE


def is_usable(findings: list[Finding]) -> bool:
    return all(finding.level is not Level.FATAL for finding in findings)


def all_findings(world: World | None) -> Iterator[Finding]:
    found: list[DeviceFacts] = []

    def devices() -> list[Finding]:
        facts, outcome = gpus.find_devices()
        found.extend([facts] if facts else [])
        return gpus.device_findings(facts, outcome)

    def data_cache() -> list[Finding]:
        from fira.data.cache import cache_folder  # here, because a missing package must not end the other checks

        return [host.folder_finding("data cache", cache_folder().absolute(), "FIRA_CACHE")]

    def shared_memory() -> list[Finding]:
        if not SHARED_MEMORY.is_dir():
            return []
        return [host.shared_memory_finding(shutil.disk_usage(SHARED_MEMORY).total, len(found[0].gpus) if found else 0)]

    return examine(
        [
            ("packages", lambda: [host.packages_finding(host.missing_packages())]),
            ("MPI", partial(mpi_findings, world)),
            ("ranks", lambda: [ranks_finding(world)]),
            ("cores", lambda: [host.cores_finding(host.read_cores())]),
            ("torch", devices),
            ("memory", lambda: [host.memory_finding(available_memory(), world.local_size if world else 1)]),
            ("shared memory", shared_memory),
            ("run folders", lambda: [host.folder_finding("run folders", Path.cwd() / "runs", "--out")]),
            ("data cache", data_cache),
        ]
    )


def mpi_findings(world: World | None) -> list[Finding]:
    """The MPI library and the launcher, and without mpirun a test that starts ranks."""
    library, outcome = launcher.find_library()
    launchers = launcher.find_launchers()
    findings = [launcher.library_finding(library, outcome)]
    if world and world.size > 1:
        return findings  # the ranks know each other, so the launcher, whichever it is, belongs to the library
    if not launchers and shutil.which("srun"):
        return [*findings, Finding("launcher", "srun; no mpirun")]
    on_path = shutil.which("mpirun")
    findings.append(launcher.launcher_finding(launchers, on_path))
    if library and launchers:
        findings.append(launcher.match_finding(library, launchers, launcher.start_ranks(launchers[0])))
    return findings


def ranks_finding(world: World | None) -> Finding:
    if world is None:
        return Finding("ranks", "1, because mpirun did not start this program")
    return Finding("ranks", f"{world.size}, of which {world.local_size} on this machine")


def environment_text(findings: list[Finding]) -> str:
    """The findings as a Markdown table, with the variables that change what torch, MPI and NCCL do."""
    prefixes = ("CUDA_", "NCCL_", "TORCH_", "PYTORCH_", "TRITON_", "OMP_", "FI_", "UCX_", "MPIR_", "PIPELINE_")
    variables = [f"`{name}={value}`" for name, value in sorted(os.environ.items()) if name.startswith(prefixes)]
    first, last = ["Fira", "", _versions()], ["variables", "", ", ".join(variables) or "none"]
    return markdown_table(["", "", ""], [first, *([f.subject, f.level, f.text] for f in findings), last])


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def _versions() -> str:
    """Of Fira, Python and the operating system."""
    try:
        fira = version("fira")
    except PackageNotFoundError:
        fira = "from a checkout"
    return f"{fira}, Python {platform.python_version()}, {platform.platform()}"
