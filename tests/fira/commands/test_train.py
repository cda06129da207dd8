"""`fira train` with the flags of the supervisor. Training itself is tested in tests/fira/training."""

import sys
from typing import Any

import pytest

from fira.commands import train
from fira.errors import UserError
from fira.supervisor import supervise


class FakeSupervisor:
    """Records its arguments, and ends with status 1."""

    arguments: tuple[Any, ...] = ()

    def __init__(self, *arguments: Any) -> None:
        FakeSupervisor.arguments = arguments

    def run(self) -> int:
        return 1


@pytest.mark.parametrize(
    ("program", "words"), [("/venv/bin/fira", ["/venv/bin/fira", "train"]), ("scripts/train.py", ["scripts/train.py"])]
)
def test_the_supervisor_starts_the_same_program(monkeypatch: pytest.MonkeyPatch, program: str, words: list[str]):
    monkeypatch.setattr(supervise, "Supervisor", FakeSupervisor)
    monkeypatch.setattr(sys, "argv", [program])
    with pytest.raises(SystemExit) as ended:
        train.main(["--max-restarts", "0", "--steps", "7", "--quiet"])
    assert ended.value.code == 1
    config, started, flags = FakeSupervisor.arguments
    assert (config.max_restarts, config.steps) == (0, 7)
    assert started == [sys.executable, *words]
    assert flags == ["--quiet"]


def test_ranks_of_mpirun_do_not_supervise(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PMI_SIZE", "2")
    monkeypatch.setenv("PMI_RANK", "1")
    with pytest.raises(UserError, match="without mpirun"):
        train.main(["--elastic", "1:2"])
