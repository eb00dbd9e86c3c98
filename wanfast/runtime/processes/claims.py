"""Records which rank group does a job: the first group that claims the job.

The operating system makes a claim in one step. So only one group gets a job, and a killed rank never leaves an
incomplete claim.
A claim is a symbolic link, and the text of the link is the group's number. If the file system has no symbolic links, a
claim is a folder instead, and the folder holds an empty folder whose name is the group's number.
This module does not import torch.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterable
from pathlib import Path

from wanfast.runtime.processes.run_folder import CLAIMS
from wanfast.runtime.store.artifacts import writing_to

_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS)
_TAKEN = (errno.ENOTEMPTY, errno.EEXIST)


def claim(run_folder: Path, index: int, number: int) -> bool:
    """Claims job `index` for rank group `number`; returns whether this group is the first to claim the job.

    Raises ConfigError if the claim cannot be written.
    """
    place = _place(run_folder, index)
    with writing_to(place):
        place.parent.mkdir(exist_ok=True)
        try:
            # A short link needs an inode of the disk but no block, so it can often be made on a full disk.
            place.symlink_to(str(number))
        except FileExistsError:  # a network file system may have sent this request twice, and refuse the second
            pass
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            _rename_folder(place, str(number))
    return claimed_by(run_folder, index) == number


def claimed_by(run_folder: Path, index: int) -> int | None:
    """Returns the number of the rank group that claimed a job, or None if no group claimed the job."""
    place = _place(run_folder, index)
    if place.is_symlink():
        return int(place.readlink().name)
    return int(next(place.iterdir()).name) if place.is_dir() else None


def newest(run_folder: Path, indices: Iterable[int]) -> int:
    """Returns the job of `indices` that was claimed last; a group must have claimed each of these jobs."""
    return max(indices, key=lambda index: _place(run_folder, index).lstat().st_mtime_ns)


def forget(run_folder: Path, index: int) -> None:
    """Removes the claim of a job, if the job is claimed."""
    place = _place(run_folder, index)
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)


def _rename_folder(place: Path, number: str) -> None:
    own = place.with_name(f".{place.name}.{number}")  # filled under this name, and then renamed in one step
    (own / number).mkdir(parents=True, exist_ok=True)
    try:
        own.rename(place)
    except OSError as error:
        if error.errno not in _TAKEN:
            raise
        shutil.rmtree(own)


def _place(run_folder: Path, index: int) -> Path:
    return run_folder / CLAIMS / str(index)
