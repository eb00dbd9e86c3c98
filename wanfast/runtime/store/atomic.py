"""Files that appear whole and together, or not at all: written beside their targets under hidden names, then renamed.

A process that is killed outright leaves its hidden `.part` files; the targets are still untouched.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from wanfast.runtime.errors import ConfigError


@contextmanager
def atomic_paths(*targets: Path, overwrite: bool = True, option: str = "--output") -> Iterator[list[Path]]:
    """Yield a path to write for each target; they become the targets when the block ends, or vanish if it fails.

    The yielded names end in `.part`: name the format yourself. Any failure counts, KeyboardInterrupt too.
    Raises ConfigError naming `option`: for an OSError (a full disk, a folder that went away), and, without
    `overwrite`, for a target that has appeared meanwhile.
    """
    partials = [partial_path(target) for target in targets]
    try:
        yield partials
        for partial in partials:
            with partial.open("rb") as file:
                os.fsync(file.fileno())
        for target in targets:
            if target.exists() and not overwrite:
                raise ConfigError(f"{option} {target}: another program wrote it meanwhile; choose another name")
        for partial, target in zip(partials, targets, strict=True):
            partial.replace(target)
    except OSError as error:
        folder, reason = targets[0].parent, error.strerror or str(error)
        raise ConfigError(
            f"{option} {targets[0]}: cannot be written ({reason}; {_free_space(folder)}); "
            "free some space or choose another folder"
        ) from error
    finally:
        for partial in partials:
            with suppress(OSError):
                partial.unlink()


def partial_path(target: Path, pid: int | None = None) -> Path:
    """The hidden sibling that a process (this one) writes before it renames: same folder, so the rename is atomic."""
    return target.with_name(f".{target.name}.{pid or os.getpid()}.part")


def remove_partials(targets: Iterable[Path], pids: Iterable[int]) -> None:
    """What processes that are gone left of `targets`, killed before they could tidy up."""
    for target, pid in itertools.product(targets, pids):
        partial_path(target, pid).unlink(missing_ok=True)


def _free_space(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free / 1e9:.1f} GB free"
    except OSError:
        return "free space unknown"
