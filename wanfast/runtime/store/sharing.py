"""Lets several users share the artifacts folder: files and locks get the permissions (mode) of their folder.

The umask (or a default ACL) decides the mode of a new folder. Some libraries ignore umask and ACL: safetensors writes
files that only their owner can read. So files that a library wrote are given the mode of the folder that holds them.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

_FILE = 0o666  # the bits that a file may have


def share(folder: Path) -> None:
    """Gives all files and folders inside `folder` the mode of `folder`, but gives files no execute bits.

    Files and folders that another user owns keep their mode.
    """
    mode = stat.S_IMODE(folder.stat().st_mode)
    for path in folder.rglob("*"):
        found = path.lstat()
        wanted = mode if stat.S_ISDIR(found.st_mode) else mode & _FILE
        ours = found.st_uid == os.geteuid() and not stat.S_ISLNK(found.st_mode)
        if ours and stat.S_IMODE(found.st_mode) != wanted:
            path.chmod(wanted)


def lock_of(path: Path, timeout: float = -1) -> FileLock:
    """Returns the lock of the lock file `path`.

    Every user who may write to the folder of `path` can take the lock.
    `timeout`: how many seconds `acquire` waits for the lock before it raises filelock.Timeout; -1 means no limit.
    """
    return FileLock(path, timeout=timeout, mode=stat.S_IMODE(path.parent.stat().st_mode) & _FILE | 0o600)


@contextmanager
def locked(path: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Holds the file lock `path` during the `with` block; calls `waiting` first if another process holds the lock."""
    lock = lock_of(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        waiting()
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def who_can_write(paths: list[Path]) -> str | None:
    """Returns a text that says why another user could have written to one of `paths`; None if no other user could.

    The user root does not count as another user. The members of the current user's primary group do not count either,
    because on many systems the current user is its only member.
    """
    for path in paths:
        found = path.stat()
        if found.st_uid not in (os.geteuid(), 0):
            return f"{path} belongs to another user"
        by_group = found.st_mode & stat.S_IWGRP and found.st_gid != os.getegid()
        if by_group or found.st_mode & stat.S_IWOTH:
            return f"other users can write {path}"
    return None


def remove(path: Path) -> None:
    """Renames a file or folder, so that readers no longer find it, and then deletes it.

    What cannot be deleted stays under the new name, and no error is raised.
    """
    aside = path.with_name(f"{path.name}.{os.getpid()}.damaged")
    path.rename(aside)
    with suppress(OSError):
        if aside.is_dir() and not aside.is_symlink():
            shutil.rmtree(aside)
        else:
            aside.unlink()
