"""Reads the frames of a video from the file into which the leader writes them while later frames are decoded.

This module does not import torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING

from wanfast.runtime.store.atomic import partial_path

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


class ArrivingFrames:
    """Reads a video's frames in order. The leader renames their file when the last frame is written.

    When the `with` block ends, the file is closed.
    """

    def __init__(self, on_frames: Callable[[npt.NDArray[np.uint8]], None]) -> None:
        """`on_frames`: a function that gets a few frames [f, H, W, 3] at a time; they do not change later."""
        self._on_frames = on_frames
        self._stream: BufferedReader | None = None
        self._frames: npt.NDArray[np.uint8] | None = None  # [F, H, W, 3], of which the first ones are read
        self._num_read = 0

    def __enter__(self) -> ArrivingFrames:
        return self

    def __exit__(self, *error: object) -> None:
        if self._stream is not None:
            self._stream.close()

    @property
    def frames(self) -> npt.NDArray[np.uint8]:
        """Returns all frames [F, H, W, 3]. Use this property only after `look` has read the last frame."""
        assert self._frames is not None and self._num_read == len(self._frames)
        return self._frames

    def look(self, file: Path) -> None:
        """Reads the frames that were written since the last call, and gives them to `on_frames`.

        `file`: the path of the complete video. Until the video is complete, the leader writes a hidden file in the same
        folder, and this method reads the hidden file.
        """
        import numpy as np

        if self._stream is None:
            self._stream = _opened(file)
        if self._stream is None or not (num_bytes := os.fstat(self._stream.fileno()).st_size):
            return
        if self._frames is None:
            np.lib.format.read_magic(self._stream)
            shape, _, dtype = np.lib.format.read_array_header_1_0(self._stream)
            self._frames = np.empty(shape, dtype)
        new = (num_bytes - self._stream.tell()) // self._frames[0].nbytes
        if new:
            frames = self._frames[self._num_read : self._num_read + new]
            self._stream.readinto(frames.data)
            self._num_read += new
            self._on_frames(frames)


def _opened(file: Path) -> BufferedReader | None:
    for path in (*file.parent.glob(partial_path(file, "*").name), file):
        with suppress(FileNotFoundError):  # not written yet, or renamed meanwhile
            return path.open("rb")
    return None
