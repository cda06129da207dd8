"""Packages, cores, memory and disk."""

import os
import re
import shutil
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

from fira.doctor import host
from fira.doctor.finding import Level
from fira.doctor.host import (
    GB,
    PACKAGES,
    Cores,
    cores_finding,
    folder_finding,
    memory_finding,
    missing_packages,
    packages_finding,
    read_cores,
    shared_memory_finding,
)
from tests.launch import ROOT


def test_packages_are_those_of_the_project():
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert set(PACKAGES) == {re.match(r"[\w-]+", requirement)[0] for requirement in needed}
    assert missing_packages() == []


def test_missing_packages():
    finding = packages_finding(["tqdm", "pyarrow"])
    assert (finding.level, finding.text, finding.remedy) == (
        Level.FATAL,
        "missing: tqdm, pyarrow",
        "pip install tqdm pyarrow",
    )
    assert packages_finding([]).level is Level.OK


@pytest.mark.parametrize(
    ("cores", "text", "level"),
    [
        (Cores(8, 8, None), "8; more ranks than this share them", Level.OK),
        (Cores(64, 4, 16.0), "4 of 64; more ranks than this share them", Level.OK),
        (Cores(8, 8, 1.5), "8, limited to the time of 1.5 by a control group", Level.PROBLEM),
    ],
)
def test_cores(cores, text, level):
    finding = cores_finding(cores)
    assert (finding.text, finding.level) == (text, level)
    assert "taskset -c 0-0 mpirun" in finding.remedy if level is Level.PROBLEM else not finding.remedy


def test_quota_of_a_control_group_or_its_parent(tmp_path: Path):
    group = tmp_path / "slice" / "job"
    group.mkdir(parents=True)
    assert read_cores(group).quota is None
    (group / "cpu.max").write_text("max 100000\n")
    assert read_cores(group).quota is None
    (group.parent / "cpu.max").write_text("250000 100000\n")
    assert read_cores(group).quota == 2.5
    assert read_cores(group).allowed == len(os.sched_getaffinity(0))


def test_quota_of_a_control_group_of_version_1(tmp_path: Path):
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("150000\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert read_cores(tmp_path).quota == 1.5
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("-1\n")
    assert read_cores(tmp_path).quota is None


def test_too_little_memory():
    assert memory_finding(4.1 * GB, 4).level is Level.OK
    finding = memory_finding(2.0 * GB, 4)
    assert (finding.level, finding.text) == (Level.PROBLEM, "2.0 GB available, 4 ranks need about 4 GB")
    assert "start fewer ranks" in finding.remedy


def test_shared_memory_matters_for_several_gpus():
    assert shared_memory_finding(64e6, gpus=1).level is Level.OK
    finding = shared_memory_finding(64e6, gpus=2)
    assert (finding.level, finding.text) == (Level.PROBLEM, "0.06 GB in /dev/shm, too little for NCCL")
    assert "--shm-size=1g" in finding.remedy


def test_little_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    free = {"free": 0.3 * GB}
    monkeypatch.setattr(host.shutil, "disk_usage", lambda folder: SimpleNamespace(**free))
    finding = folder_finding("run folders", tmp_path, "--out")
    assert (finding.level, finding.text) == (Level.PROBLEM, f"0.3 GB free in {tmp_path}")
    assert finding.remedy == "free 5 GB, or choose a folder on another disk with --out"
    free["free"] = 6 * GB
    assert folder_finding("run folders", tmp_path, "--out").level is Level.OK


def test_a_folder_that_does_not_exist_yet_is_judged_by_its_parent(tmp_path: Path):
    free = shutil.disk_usage(tmp_path).free / GB
    finding = folder_finding("data cache", tmp_path / "a" / "b", "FIRA_CACHE")
    assert float(finding.text.split()[0]) == pytest.approx(free, rel=0.05)


def test_a_folder_below_a_file_makes_training_impossible(tmp_path: Path):
    (tmp_path / "file").write_text("")
    finding = folder_finding("data cache", tmp_path / "file" / "cache", "FIRA_CACHE")
    assert (finding.level, finding.text) == (Level.FATAL, f"{tmp_path}/file/cache is not writable")
    assert finding.remedy == "choose another folder with FIRA_CACHE"
