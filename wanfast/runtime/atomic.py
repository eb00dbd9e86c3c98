"""Files that appear whole or not at all: written beside the target under a hidden name, synced, then renamed over it.

Limit: a process that is killed outright leaves its hidden `.part` file; the target is still untouched.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from wanfast.runtime.errors import ConfigError


@contextmanager
def atomic_path(target: Path, option: str = "--output") -> Iterator[Path]:
    """Yield the path to write to; it becomes `target` when the block ends, and is removed if the block fails.

    The yielded name ends in `.part`: name the format yourself. Any failure counts, KeyboardInterrupt too.
    Raises ConfigError, naming `option` and the free space, for an OSError: a full disk, a folder that went away.
    """
    partial = partial_path(target)
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(target)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(
            f"{option} {target}: cannot be written ({reason}; {_free_space(target.parent)}); "
            "free some space or choose another folder"
        ) from error
    finally:
        with suppress(OSError):
            partial.unlink()


def partial_path(target: Path) -> Path:
    """The hidden sibling that this process writes before it renames: same folder, so that the rename is atomic."""
    return target.with_name(f".{target.name}.{os.getpid()}.part")


def _free_space(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free / 1e9:.1f} GB free"
    except OSError:
        return "free space unknown"
