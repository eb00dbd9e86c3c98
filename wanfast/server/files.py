"""Keeps the server's files in one folder: videos, thumbnails, and the images of running jobs."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from wanfast.runtime.errors import ConfigError
from wanfast.runtime.store.atomic import atomic_paths, hindrance

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_OWN = ("video_", "jobs.sqlite", "lock", "warm-up.png")  # with these, names in the folder begin
_THUMBNAIL_SIDE = 512  # pixels at most


class Files:
    """This class names, writes and removes the files of each attempt.

    An attempt's name comes from the database, and never from a client.
    """

    def __init__(self, folder: Path) -> None:
        """Makes the folder, and denies all other users access to it.

        Raises ConfigError if the folder cannot be made, or if it holds files of other programs and other users
        have access to it, as to /tmp.
        """
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            others = [file.name for file in folder.iterdir() if not file.name.lstrip(".").startswith(_OWN)]
            if folder.stat().st_mode & 0o077 and others:
                raise ConfigError(
                    f"--data-dir {folder}: has files of other programs: give a folder that only the server uses"
                )
            folder.chmod(0o700)
        except OSError as error:
            raise ConfigError(f"--data-dir {folder}: {hindrance(folder, error)}: choose another folder") from error

    def video(self, attempt: str) -> Path:
        return self.folder / f"{attempt}.mp4"

    def thumbnail(self, attempt: str) -> Path:
        return self.folder / f"{attempt}.jpg"

    def image(self, attempt: str, option: str) -> Path:
        return self.folder / f"{attempt}.{option}"

    def free_bytes(self) -> int:
        """Returns the free space of the folder's disk; 0 if the folder is gone."""
        try:
            return shutil.disk_usage(self.folder).free
        except OSError:
            return 0

    def write_thumbnail(self, attempt: str, frame: npt.NDArray[np.uint8]) -> None:
        """Writes a uint8 RGB frame [H, W, 3] as a JPEG with sides of at most 512 pixels. Raises ConfigError."""
        from PIL import Image

        small = Image.fromarray(frame)
        small.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE))
        with atomic_paths(self.thumbnail(attempt), option="--data-dir") as (unfinished,), unfinished.open("wb") as file:
            small.save(file, "JPEG", quality=85)

    def remove(self, attempt: str) -> None:
        """Removes all files of an attempt."""
        for file in self.folder.glob(f"{attempt}.*"):
            file.unlink(missing_ok=True)

    def sweep(self, listed: Collection[Path], wanted: Collection[str]) -> None:
        """Removes each file in `listed`, complete or half-written, that belongs to no attempt in `wanted`.

        The caller must first list the files, and then read the wanted attempts from the database. In the other order,
        the files of an attempt that begins in between would be removed.
        """
        for file in listed:
            if file.name.lstrip(".").partition(".")[0] not in wanted:
                with suppress(OSError):
                    file.unlink()

    def listed(self) -> list[Path]:
        """Returns all files that belong to attempts."""
        return [file for file in self.folder.iterdir() if file.name.lstrip(".").startswith("video_")]
