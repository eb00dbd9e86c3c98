"""The memory that this host has free."""

from __future__ import annotations


def available_host_bytes() -> int:
    """Bytes of host memory that a process can take."""
    import psutil

    return int(psutil.virtual_memory().available)
