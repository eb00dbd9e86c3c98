"""Writes a set of files completely or not at all.

The files are first written under hidden names beside their targets, and then renamed. A process that is killed
(SIGKILL) leaves its hidden files, which `remove_partials` removes.
"""

from __future__ import annotations

import errno
import itertools
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from wanfast.runtime.errors import ConfigError
from wanfast.runtime.facts.memory import gb

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, the user's share of it, or the largest file


@contextmanager
def atomic_paths(
    *targets: Path, overwrite: bool = True, option: str = "--output", synced: bool = True
) -> Iterator[list[Path]]:
    """Yields a temporary path for each target, and renames the files to the targets when the `with` block ends.

    If the block raises an exception (KeyboardInterrupt too), the temporary files are removed. If a rename fails, the
    earlier renames are undone, and replaced targets get their old files back. The temporary names end in `.part`, so a
    writer cannot infer the file format from the name. An OSError (a full disk, a removed folder) becomes a ConfigError
    that names `option`. If `overwrite` is false and a target exists when the block ends, a ConfigError is raised too.
    If `synced` is true, the files are written to disk before the rename, so that they survive a crash of the machine.
    """
    partials = [partial_path(target) for target in targets]
    try:
        yield partials
        for partial in partials if synced else ():
            with partial.open("rb") as file:
                os.fsync(file.fileno())
        for target in targets:
            if os.path.lexists(target) and not overwrite:
                raise ConfigError(f"{option} {target}: another program wrote this file meanwhile; choose another name")
        _publish(partials, targets)
    except OSError as error:
        raise not_written(targets[0], error, option) from error
    finally:
        for left in (*partials, *map(_old_path, targets)):
            with suppress(OSError):
                left.unlink()


def not_written(target: Path, error: OSError, option: str = "--output") -> ConfigError:
    """Returns the ConfigError for a file that could not be written.

    Its message states the reason and the fix; if the disk is full, it states the free space too.
    """
    reason = hindrance(target, error)
    if error.errno not in FULL:
        return ConfigError(f"{option} {target}: cannot be written ({reason}); choose another folder or name")
    return ConfigError(
        f"{option} {target}: cannot be written ({reason}; {_free_space(target.parent)}); "
        "free some space or choose another folder"
    )


def hindrance(target: Path, error: OSError) -> str:
    """Returns why `target` could not be written: a file is where a folder is needed, or the system's reason."""
    if error.errno in (errno.EEXIST, errno.ENOTDIR):
        for path in (target, *target.parents):
            if path.is_file():
                return f"{path} is a file, not a folder"
    return error.strerror or str(error)


def _publish(partials: Sequence[Path], targets: Sequence[Path]) -> None:
    """Renames all files or none. An old file keeps a second name until all are renamed, where links exist."""
    with ExitStack() as undo:
        for partial, target in zip(partials, targets, strict=True):
            old = _old_path(target)
            old.unlink(missing_ok=True)
            if len(targets) > 1 and os.path.lexists(target):
                with suppress(OSError, NotImplementedError):  # a folder, or a file system without hard links
                    os.link(target, old, follow_symlinks=False)
            partial.replace(target)
            undo.callback(_restore, target, old)
        undo.pop_all()


def _restore(target: Path, old: Path) -> None:
    if os.path.lexists(old):
        old.replace(target)
    else:
        target.unlink()


def partial_path(target: Path, pid: int | str | None = None) -> Path:
    """Returns the hidden path to which a process writes, before it renames the file to `target`.

    `pid`: the id of the process that writes, by default the calling process; "*" gives a pattern for every process.
    """
    # In the folder of `target`, so that the rename is atomic.
    return target.with_name(f".{target.name}.{pid or os.getpid()}.part")


def _old_path(target: Path, pid: int | None = None) -> Path:
    """Returns the second name of an old file while the files of its set are renamed."""
    return partial_path(target, pid).with_suffix(".old")


def remove_partials(targets: Iterable[Path], pids: Iterable[int]) -> None:
    """Removes the hidden files that the killed processes `pids` left beside `targets`.

    Targets whose names differ only in the suffix form a set. If a process was killed while it renamed the files of a
    set, the finished renames are undone: a target gets its old file back, or is removed if there was no old file.
    """
    sets: dict[Path, list[Path]] = {}
    for target in targets:
        sets.setdefault(target.with_suffix(""), []).append(target)
    for pid, files in itertools.product(pids, sets.values()):
        left = [os.path.lexists(partial_path(target, pid)) for target in files]
        for target in files[: left.index(True)] if True in left else ():
            old = _old_path(target, pid)
            if os.path.lexists(old):
                old.replace(target)
            else:
                target.unlink(missing_ok=True)
        for target in files:
            for path in (partial_path(target, pid), _old_path(target, pid)):
                path.unlink(missing_ok=True)


def _free_space(folder: Path) -> str:
    try:
        return f"{gb(shutil.disk_usage(folder).free)} free"
    except OSError:
        return "free space unknown"
