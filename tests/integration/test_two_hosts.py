"""Two hosts, simulated by two connected network namespaces: their ranks communicate by TCP only."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from fira.metrics.csv_log import read_log
from tests.launch import ROOT, run_ranks

HOSTS = {"10.77.0.1": f"mpi-a-{os.getpid()}", "10.77.0.2": f"mpi-b-{os.getpid()}"}  # address: namespace
FIRST, SECOND = HOSTS.values()
SSH = f"""#!/bin/sh
# arguments: options, address of the second host, command
while [ "${{1#-}}" != "$1" ]; do shift; done
shift
exec ip netns exec {SECOND} sh -c "$*"
"""
SETTINGS = """
model_set = "d_model=16,num_layers=2,d_ff=16,n_head=2"
vocab_size = 300
seq-len = 16
batch_size = 4
micro_batch_size = 1
steps = 3
eval_every = 3
eval_sequences = 4
"""
pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Return the environment for mpirun with both hosts: a host file and a replacement of ssh."""
    if not shutil.which("ip"):
        pytest.skip("needs the ip command (Debian: iproute2)")
    if subprocess.run(["ip", "netns", "add", FIRST], capture_output=True).returncode:
        pytest.skip("this user may not create network namespaces")
    folder = tmp_path_factory.mktemp("hosts")
    try:
        ip("netns", "add", SECOND)
        ip("link", "add", "cable", "netns", FIRST, "type", "veth", "peer", "name", "cable", "netns", SECOND)
        for address, name in HOSTS.items():
            ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
            for link in ("lo", "cable"):
                ip("-n", name, "link", "set", link, "up")
        (folder / "hosts").write_text("".join(f"{address}:2\n" for address in HOSTS))
        (folder / "ssh").write_text(SSH)
        (folder / "ssh").chmod(0o755)
        yield {
            "HYDRA_HOST_FILE": str(folder / "hosts"),
            "HYDRA_LAUNCHER": "ssh",
            "HYDRA_LAUNCHER_EXEC": str(folder / "ssh"),
            "UCX_TLS": "tcp,self",  # both hosts share a kernel, and UCX would use shared memory
        }
    finally:
        for name in HOSTS.values():
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def run(hosts: dict[str, str], script: str, *args: object) -> str:
    """Run two ranks on each host and return their stdout."""
    result = run_ranks(4, ROOT / script, *args, timeout=120, env=hosts, within=["ip", "netns", "exec", FIRST])
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def received() -> int:
    """Return the number of bytes that the first host has received over the virtual cable."""
    return json.loads(ip("-n", FIRST, "-json", "-statistics", "link", "show", "cable"))[0]["stats64"]["rx"]["bytes"]


def test_local_ranks_and_sum_over_two_hosts(hosts: dict[str, str]) -> None:
    before = received()
    ranks = sorted(line.split() for line in run(hosts, "tests/ranks/hang_hosts.py").splitlines())
    machines = [rank.pop() for rank in ranks]
    assert ranks == [[str(rank), str(rank % 2), "2", "6.0"] for rank in range(4)]  # rank, local rank and size, sum
    assert machines[0] == machines[1] != machines[2] == machines[3]
    assert received() - before > 4_000_000


def test_training_on_two_hosts_matches_one_rank(hosts: dict[str, str], tmp_path: Path) -> None:
    shutil.copy(json.decoder.__file__, tmp_path / "text.txt")
    (tmp_path / "settings.toml").write_text(SETTINGS + f'data = "{tmp_path / "text.txt"}"\n')
    flags = ["--config", tmp_path / "settings.toml", "--out"]
    cache = {"FIRA_CACHE": str(tmp_path / "cache")}
    run(hosts | cache, "scripts/train.py", *flags, tmp_path / "two", "--pp", 2, "--dp", 2, "--ep", 2)
    assert run_ranks(1, ROOT / "scripts/train.py", *flags, tmp_path / "one", timeout=120, env=cache).returncode == 0
    one, two = (read_log(tmp_path / name / "training_log.csv")["train_loss"] for name in ("one", "two"))
    assert len(one) == 3
    assert list(one) == pytest.approx(list(two), rel=1e-6)
