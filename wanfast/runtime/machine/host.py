"""Reports the free memory of this host."""

from __future__ import annotations


def available_host_bytes() -> int:
    """Returns the bytes of host memory that a process can allocate."""
    import psutil

    return int(psutil.virtual_memory().available)
