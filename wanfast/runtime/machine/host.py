"""Reports the memory and the cores that this process may use: the host's, or less if a control group sets a limit.

A container has such limits. The host's own figures do not show these limits, and a process that exceeds its memory
limit is killed without a message. Both versions of Linux's control groups are read (kernel documentation,
admin-guide/cgroup-v2.rst and admin-guide/cgroup-v1/memory.rst). A group's limit also holds for the groups inside it.
Therefore, the smallest limit counts.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from wanfast.runtime.machine.once import remembered

THREADS = "OMP_NUM_THREADS"  # a user's own number of threads for each process
_SMALL_DIM = 1024  # below, more threads would slow the short matrix products of a model
_ROOT = Path("/sys/fs/cgroup")
_OF_PROCESS = Path("/proc/self/cgroup")
# (limit, bytes in use, the key in memory.stat of file pages that the kernel frees first), of version 2 and 1
_MEMORY = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


@dataclass(frozen=True)
class HostMemory:
    """This class holds how many bytes of memory this process may use in all, and how many of them are free."""

    total_bytes: int
    free_bytes: int
    is_limited: bool  # by a control group


@remembered
def memory() -> HostMemory:
    """Returns the host's memory, or less if a control group has a limit; the smallest limit counts."""
    import psutil

    host = psutil.virtual_memory()
    limits = [found for group in _groups("memory") if (found := _memory_of(group)) is not None]
    total = min([host.total, *(limit for limit, _ in limits)])
    free = min([host.available, *(limit - used for limit, used in limits)])
    return HostMemory(total, max(0, free), is_limited=total < host.total)


def available_host_bytes() -> int:
    """Returns the free bytes of host memory that this process may use; a control group's limit is respected."""
    return memory().free_bytes


def cores() -> int:
    """Returns how many cores this process may use: those of its affinity, or fewer if a control group has a quota."""
    quotas = [quota for group in _groups("cpu") if (quota := _quota_of(group)) is not None]
    return max(1, min([len(os.sched_getaffinity(0)), *quotas]))


def share_of_cores(ranks: int) -> int:
    """Returns how many cores each rank gets if `ranks` ranks share the usable cores; at least one."""
    return max(1, cores() // ranks)


def own_threads(dim: int, ranks: int = 1) -> int:
    """Returns how many CPU threads a rank gets if OMP_NUM_THREADS is not set.

    `dim`: the model's width. With a single rank, a model with a width below 1024 gets one thread. In all other cases, a
    rank gets its share of the cores.
    """
    return 1 if ranks == 1 and dim < _SMALL_DIM else share_of_cores(ranks)


def _groups(controller: str) -> Iterator[Path]:
    """Yields the folder of this process's group and of each group above it, for both versions."""
    lines = _OF_PROCESS.read_text().splitlines() if _OF_PROCESS.is_file() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = _ROOT / controller if controllers else _ROOT
        inside = Path(path.lstrip("/"))  # a container may not show the groups above its own: then the top is its own
        yield from (top / group for group in (inside, *inside.parents) if (top / group).is_dir())


def _memory_of(group: Path) -> tuple[int, int] | None:
    """Returns (limit, bytes in use that cannot be reclaimed) of a group, or None if the group has no limit."""
    for limit_file, used_file, reclaimable in _MEMORY:
        limit, used = _number(group / limit_file), _number(group / used_file)
        if limit is not None and used is not None:
            return limit, used - _statistics(group / "memory.stat").get(reclaimable, 0)
    return None


def _quota_of(group: Path) -> int | None:
    """Returns the cores of a group's quota, rounded up, or None if the group has no quota."""
    quota, period = (_text(group / "cpu.max").split() or ["", ""])[:2]
    if not quota:
        quota, period = _text(group / "cpu.cfs_quota_us"), _text(group / "cpu.cfs_period_us")
    return None if quota in ("", "max", "-1") or not period else math.ceil(int(quota) / int(period))


def _number(file: Path) -> int | None:
    """Returns the number in a file, or None if the file is missing, may not be read, or says "max"."""
    text = _text(file) or "max"
    return int(text) if text.isdecimal() else None


def _statistics(file: Path) -> dict[str, int]:
    return {name: int(value) for name, value in map(str.split, _text(file).splitlines())}


def _text(file: Path) -> str:
    """Returns the text of a file, or "" if the file is missing or may not be read."""
    try:
        return file.read_text().strip()
    except OSError:
        return ""
