"""Available memory of a machine and of control groups of both versions."""

import shlex
import subprocess
import sys
from pathlib import Path

from fira.host_memory import available_memory


def test_memory_is_that_of_the_machine_or_of_the_smallest_control_group(tmp_path: Path):
    meminfo, outer = tmp_path / "meminfo", tmp_path / "outer"
    inner = outer / "inner"
    inner.mkdir(parents=True)
    meminfo.write_text("MemTotal:  100 kB\nMemAvailable:   50 kB\nHugePages_Total:       0\n")
    assert available_memory([inner], meminfo) == 50 * 1024
    (inner / "memory.max").write_text("max\n")
    (inner / "memory.current").write_text("10000\n")
    assert available_memory([inner], meminfo) == 50 * 1024
    (outer / "memory.max").write_text("30000\n")
    (outer / "memory.current").write_text("10000\n")
    assert available_memory([inner], meminfo) == 20000
    (outer / "memory.stat").write_text("anon 9000\nfile 1000\ninactive_file 600\nactive_file 300\n")
    assert available_memory([inner], meminfo) == 20900
    assert available_memory([tmp_path], meminfo) == 50 * 1024


def test_control_groups_of_version_1(tmp_path: Path):
    (tmp_path / "memory.limit_in_bytes").write_text("30000\n")
    (tmp_path / "memory.usage_in_bytes").write_text("25000\n")
    (tmp_path / "memory.stat").write_text("cache 5\ntotal_inactive_file 2000\ntotal_active_file 1000\n")
    assert available_memory([tmp_path / "gone"], tmp_path / "missing") == 8000


def test_memory_of_this_machine():
    assert 1e6 < available_memory() < 1e15


def test_a_limit_of_addresses_counts():
    program = "from fira.host_memory import available_memory; print(available_memory())"
    command = f"ulimit -v 1000000 && {shlex.quote(sys.executable)} -c {shlex.quote(program)}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True, timeout=60)
    assert 1e8 < float(result.stdout) < 1000000 * 1024
