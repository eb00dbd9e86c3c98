"""Lets the users of a group share a folder: files get the mode that the folder asks for, locks too.

The umask (or the folder's default ACL) decides the mode of a new folder. Libraries ignore it: safetensors writes files
that only their owner can read. So what a library wrote takes the mode of the folder that holds it.
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
    """Gives everything of ours below `folder` the mode of `folder` itself, files without the bits to run them."""
    mode = stat.S_IMODE(folder.stat().st_mode)
    for path in folder.rglob("*"):
        found = path.lstat()
        wanted = mode if stat.S_ISDIR(found.st_mode) else mode & _FILE
        ours = found.st_uid == os.geteuid() and not stat.S_ISLNK(found.st_mode)
        if ours and stat.S_IMODE(found.st_mode) != wanted:
            path.chmod(wanted)


def lock_of(path: Path, timeout: float = -1) -> FileLock:
    """Returns a lock that every user who may write the folder can take."""
    return FileLock(path, timeout=timeout, mode=stat.S_IMODE(path.parent.stat().st_mode) & _FILE | 0o600)


@contextmanager
def locked(path: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Holds a lock during the block; calls `waiting` first if another process holds the lock."""
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
    """Returns why other users could have written one of `paths`; None if only this user and root can write them all.

    A group that is this user's primary group counts as this user, because many systems give each user such a group.
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
    """Removes a file or folder in one step for its readers; what cannot be deleted stays under another name."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.damaged")
    path.rename(aside)
    with suppress(OSError):
        if aside.is_dir() and not aside.is_symlink():
            shutil.rmtree(aside)
        else:
            aside.unlink()
