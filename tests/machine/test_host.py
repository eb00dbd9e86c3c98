from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from wanfast.runtime.machine import host

GB = 10**9
REAL = Path("/sys/fs/cgroup/memory") if Path("/sys/fs/cgroup/memory").is_dir() else Path("/sys/fs/cgroup")


def lay_out(root: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content + "\n")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns the folder of control groups of a host with 1 TB, of which 900 GB are free, and 64 cores."""
    memory = type("Memory", (), {"total": 1000 * GB, "available": 900 * GB})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    monkeypatch.setattr(host, "_ROOT", tmp_path / "cgroup")
    monkeypatch.setattr(host, "_OF_PROCESS", tmp_path / "process")
    return tmp_path


def test_without_control_groups_the_host_counts(root: Path) -> None:
    assert host.memory() == host.HostMemory(1000 * GB, 900 * GB, is_limited=False)
    assert host.cores() == 64


@pytest.mark.parametrize("path", ["/", "/docker/abc"], ids=["in a namespace of its own", "with the host's path"])
def test_version_2(root: Path, path: str) -> None:
    lay_out(
        root,
        {
            "process": f"0::{path}",
            "cgroup/memory.max": f"{64 * GB}",
            "cgroup/memory.current": f"{30 * GB}",
            "cgroup/memory.stat": f"anon {10 * GB}\ninactive_file {12 * GB}",
            "cgroup/cpu.max": "250000 100000",
        },
    )
    assert host.memory() == host.HostMemory(64 * GB, 46 * GB, is_limited=True)
    assert host.cores() == 3


def test_a_group_above_may_be_tighter(root: Path) -> None:
    lay_out(
        root,
        {
            "process": "0::/pod/one",
            "cgroup/pod/memory.max": f"{16 * GB}",
            "cgroup/pod/memory.current": f"{15 * GB}",
            "cgroup/pod/one/memory.max": f"{32 * GB}",
            "cgroup/pod/one/memory.current": f"{1 * GB}",
            "cgroup/pod/one/cpu.max": "max 100000",
            "cgroup/pod/cpu.max": "800000 100000",
        },
    )
    assert host.memory() == host.HostMemory(16 * GB, 1 * GB, is_limited=True)
    assert host.cores() == 8


def test_version_1(root: Path) -> None:
    lay_out(
        root,
        {
            "process": "9:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n0::/",
            "cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
            "cgroup/memory/memory.usage_in_bytes": f"{200 * GB}",
            "cgroup/memory/docker/abc/memory.limit_in_bytes": f"{64 * GB}",
            "cgroup/memory/docker/abc/memory.usage_in_bytes": f"{60 * GB}",
            "cgroup/memory/docker/abc/memory.stat": f"total_inactive_file {4 * GB}",
            "cgroup/cpu/docker/abc/cpu.cfs_quota_us": "150000",
            "cgroup/cpu/docker/abc/cpu.cfs_period_us": "100000",
            "cgroup/cpu/cpu.cfs_quota_us": "-1",
            "cgroup/cpu/cpu.cfs_period_us": "100000",
        },
    )
    assert host.memory() == host.HostMemory(64 * GB, 8 * GB, is_limited=True)
    assert host.cores() == 2


def test_a_group_over_its_limit_has_no_free_memory(root: Path) -> None:
    lay_out(root, {"process": "0::/", "cgroup/memory.max": "100", "cgroup/memory.current": "120"})
    assert host.memory().free_bytes == 0


@pytest.fixture
def real_group() -> Iterator[Path]:
    """Yields a real control group with a limit of 700 MB; skips the test where none can be made."""
    group = REAL / f"wanfast-test-{os.getpid()}"
    limit = group / ("memory.limit_in_bytes" if REAL.name == "memory" else "memory.max")
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    try:
        try:
            limit.write_text("700000000")
        except OSError as error:
            pytest.skip(f"no control group can be limited here: {error}")
        yield group
    finally:
        group.rmdir()


def test_a_real_control_group_limits_a_process_inside_it(real_group: Path) -> None:
    code = (
        "import os, sys; open(sys.argv[1], 'w').write(str(os.getpid()))\n"
        "from wanfast.runtime.machine import host; print(host.memory().total_bytes, host.memory().free_bytes)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(real_group / "cgroup.procs")], capture_output=True, text=True, check=True
    )
    total, free = map(int, done.stdout.split())
    assert total == 700_000_000 // 4096 * 4096 and 500_000_000 < free < total
