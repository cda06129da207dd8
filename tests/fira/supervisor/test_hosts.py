"""Host files of both MPI implementations, programs that print one, and the placement of ranks."""

import os
from pathlib import Path

import pytest

from fira.errors import UserError
from fira.supervisor.hosts import lost, place, read_hosts


def test_host_files_of_both_implementations(tmp_path: Path):
    mpich, open_mpi = tmp_path / "mpich", tmp_path / "open_mpi"
    mpich.write_text("# machines\nnode1:4\n10.0.0.2:2  # slow\n\nnode3\n")
    open_mpi.write_text("node1 slots=4\n10.0.0.2 slots = 2 max_slots=4\nnode3\n")
    assert read_hosts(str(mpich)) == read_hosts(str(open_mpi)) == {"node1": 4, "10.0.0.2": 2, "node3": 1}


def test_a_program_prints_the_hosts(tmp_path: Path):
    program = tmp_path / "hosts.sh"
    program.write_text("#!/bin/sh\necho localhost:3\n")
    program.chmod(0o755)
    assert read_hosts(str(program)) == {"localhost": 3}
    program.write_text("#!/bin/sh\necho the scheduler does not answer\nexit 3\n")
    with pytest.raises(UserError, match="status 3: the scheduler does not answer"):
        read_hosts(str(program))


def test_invalid_files_are_named(tmp_path: Path):
    file = tmp_path / "hosts"
    with pytest.raises(UserError, match="hosts: No such file"):
        read_hosts(str(file))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe: not a regular file"):
        read_hosts(str(tmp_path / "pipe"))
    file.write_text("node1:four\n")
    with pytest.raises(UserError, match="'node1:four' is not a host"):
        read_hosts(str(file))


def test_hosts_are_filled_in_order():
    slots = {"a": 2, "b": 0, "c": 2, "d": 2}
    assert place(slots, 3) == {"a": 2, "c": 1}
    assert place(slots, 6) == {"a": 2, "c": 2, "d": 2}


def test_hosts_with_fewer_slots_than_ranks_are_lost():
    placement = {"a": 2, "c": 1}
    assert lost(placement, {"a": 2, "c": 1, "d": 4}) == []
    assert lost(placement, {"a": 1, "d": 4}) == ["a (1 of 2 slots)", "c"]
