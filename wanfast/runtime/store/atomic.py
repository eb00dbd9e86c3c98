"""Writes a set of files completely or not at all: first under hidden names beside their targets, then renamed.

A process that is killed (SIGKILL) leaves its hidden `.part` files; the targets stay unchanged.
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
def atomic_paths(
    *targets: Path, overwrite: bool = True, option: str = "--output", synced: bool = True
) -> Iterator[list[Path]]:
    """Yields a temporary path for each target, and renames the files to the targets when the block ends.

    If the block fails (KeyboardInterrupt too), the temporary files are removed. The yielded names end in `.part`, so
    the caller must name the file format itself. Raises ConfigError naming `option` for an OSError (a full disk, a
    removed folder). Without `overwrite`, also raises ConfigError if a target has appeared meanwhile. Files that
    need not outlive a crash of the machine are not `synced`.
    """
    partials = [partial_path(target) for target in targets]
    try:
        yield partials
        for partial in partials if synced else ():
            with partial.open("rb") as file:
                os.fsync(file.fileno())
        for target in targets:
            if target.exists() and not overwrite:
                raise ConfigError(f"{option} {target}: another program wrote this file meanwhile; choose another name")
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
    """Returns the hidden path beside `target` that a process (default: this one) writes before the rename.

    Both paths are in one folder, so that the rename is atomic.
    """
    return target.with_name(f".{target.name}.{pid or os.getpid()}.part")


def remove_partials(targets: Iterable[Path], pids: Iterable[int]) -> None:
    """Removes the hidden files of `targets` that killed processes (`pids`) left."""
    for target, pid in itertools.product(targets, pids):
        partial_path(target, pid).unlink(missing_ok=True)


def _free_space(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free / 1e9:.1f} GB free"
    except OSError:
        return "free space unknown"
